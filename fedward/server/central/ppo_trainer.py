"""PPO as a thin subclass of TRL's GRPO trainer, because TRL 1.16 has none.

TRL generates, rewards, computes log probabilities and the clipped policy loss. Three hooks are
wrapped: the rewards are kept, the advantages become those of generalised advantage estimation, one
for each token, and the critic's loss is added. ``tests/server/central/test_ppo.py`` holds the hooks
to what this module expects of them.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from fedward.errors import ModelError
from fedward.server.central.ppo_config import PPOConfig


def advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, equation 16).

    Args:
        rewards: For each token, shape (batch, seq).
        values: The critic's, shape (batch, seq).
        mask: 1 for the tokens of a completion, which stand first, else 0; shape (batch, seq).
        discount: 0 to 1.
        gae_lambda: 0 to 1.

    Returns:
        Shape (batch, seq), 0 where the mask is.

    >>> one = torch.ones(1, 3)
    >>> advantages(torch.tensor([[0.0, 0.0, 1.0]]), 0 * one, one, 1.0, 0.5).tolist()
    [[0.25, 0.5, 1.0]]
    """
    values = values * mask
    found = torch.zeros_like(values)
    last = torch.zeros_like(values[:, 0])
    after = torch.zeros_like(last)
    for place in reversed(range(values.shape[1])):
        delta = rewards[:, place] + discount * after - values[:, place]
        last = (delta + discount * gae_lambda * last) * mask[:, place]
        after = values[:, place]
        found[:, place] = last
    return found


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask, 0 elsewhere."""
    count = mask.sum().clamp(min=1)
    centred = (x - (x * mask).sum() / count) * mask
    return centred / (centred.square().sum() / count).sqrt().clamp(min=1e-6)


class PPOTrainer(GRPOTrainer):
    """TRL's GRPO trainer with a critic.

    Args:
        critic: Token classifier with one output; its trainable parameters get a rate of their own.
        **given: What the GRPO trainer takes, with :class:`PPOConfig` as ``args``.
    """

    def __init__(self, *, critic: nn.Module, **given: Any) -> None:  # noqa: ANN401  # TRL's
        super().__init__(**given)
        if self.accelerator.num_processes > 1:
            raise ModelError("ppo trains in one process: its critic's gradients are not shared")
        self.settings = cast("PPOConfig", self.args)
        self.critic = critic.to(self.accelerator.device)
        self._rewards = torch.zeros(0)
        self.add_callback(_CriticSteps(self.critic))

    def create_optimizer(self, model: nn.Module | None = None) -> Any:  # noqa: ANN401  # torch's
        """The policy's optimizer, with the critic as a group of its own."""
        optimizer = super().create_optimizer(model)
        parameters = [p for p in self.critic.parameters() if p.requires_grad]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(parameters[0]) not in held:
            rate = self.settings.critic_learning_rate
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  # TRL's
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:  # noqa: ANN401  # TRL's
        made = cast("dict[str, Any]", super()._generate_and_score_completions(inputs))
        mask = made["completion_mask"].float()
        weights = self.reward_weights.to(self._rewards.device)
        scores = (self._rewards * weights).nansum(dim=1)
        rewards = torch.zeros_like(mask)
        last = mask.sum(dim=1).long().clamp(min=1) - 1
        rewards[torch.arange(len(rewards)), last] = scores.to(rewards)
        if self.beta != 0:
            if "ref_per_token_logps" not in made or "old_per_token_logps" not in made:
                raise ModelError("TRL left out the log probabilities that the divergence needs")
            rewards = rewards - self.beta * mask * (
                made["old_per_token_logps"] - made["ref_per_token_logps"]
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            values = self._values(made).float() * mask
        found = advantages(rewards, values, mask, self.settings.discount, self.settings.gae_lambda)
        # A completion that nothing scored teaches nothing.
        mask = mask * (~torch.isnan(self._rewards).all(dim=1)).to(mask).unsqueeze(1)
        made["values"], made["returns"], made["scored"] = values, found + values, mask
        made["advantages"] = whiten(found, mask)
        return made

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0  # the divergence is in the reward
        try:
            loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        finally:
            self.beta = beta
        value, old, mask = self._values(inputs).float(), inputs["values"], inputs["scored"]
        clip = self.settings.value_clip
        clipped = old + (value - old).clamp(-clip, clip)
        error = torch.maximum(
            (value - inputs["returns"]).square(), (clipped - inputs["returns"]).square()
        )
        value_loss = (error * mask).sum() / mask.sum().clamp(min=1)
        mode = "train" if cast("nn.Module", self.model).training else "eval"
        self._metrics[mode]["value_loss"].append(value_loss.item())
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        total: Tensor = loss + self.settings.value_weight * value_loss / steps
        return total

    def _values(self, batch: Mapping[str, Any]) -> Tensor:
        """What the critic expects before each token of the completions, shape (batch, seq)."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        logits = self.critic(input_ids=ids, attention_mask=mask).logits
        return cast("Tensor", logits[:, -length - 1 : -1, 0])


class _CriticSteps(TrainerCallback):
    """Does for the critic what transformers' trainer does for the model alone."""

    def __init__(self, critic: nn.Module) -> None:
        self.critic = critic

    def on_pre_optimizer_step(self, args: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401  # theirs
        """Clip the critic's gradient like the policy's, but by itself."""
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:  # noqa: ANN401  # theirs
        """Drop the critic's gradient."""
        self.critic.zero_grad(set_to_none=True)
