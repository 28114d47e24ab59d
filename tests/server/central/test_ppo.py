"""PPO: the advantages by their formula, the hooks of TRL that are wrapped, and what they carry."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from fedward.errors import ConfigurationError
from fedward.server.central.ppo_trainer import PPOTrainer, advantages, whiten
from fedward.server.central.settings import settings
from fedward.server.central.stages import build
from tests.server.central.rig import build_base, make_step


def naive(rewards: list[float], values: list[float], discount: float, lam: float) -> list[float]:
    """Schulman et al. 2015, equation 16, as a sum over all later steps."""
    after = [*values[1:], 0.0]
    deltas = [r + discount * v1 - v0 for r, v0, v1 in zip(rewards, values, after, strict=True)]
    return [
        sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_are_those_of_the_paper(discount, lam):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 6, generator=generator)
    values = torch.randn(3, 6, generator=generator)
    lengths = [6, 4, 1]
    mask = torch.tensor([[float(i < n) for i in range(6)] for n in lengths])
    found = advantages(rewards * mask, values, mask, discount, lam)
    for row, n in enumerate(lengths):
        expected = naive(rewards[row, :n].tolist(), values[row, :n].tolist(), discount, lam)
        assert found[row, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert not found[row, n:].any()
    other = advantages(rewards * mask, values, mask, discount, lam * 0.8)
    assert not torch.allclose(found, other)


def test_whitened_is_whitened_over_the_mask():
    x, mask = torch.randn(4, 5) * 7 + 3, torch.ones(4, 5)
    mask[:, 3:] = 0
    found = whiten(x, mask)
    assert not found[:, 3:].any()
    inside = found[:, :3]
    assert inside.mean().abs() < 1e-5
    assert inside.square().mean() == pytest.approx(1, abs=1e-4)


def test_trl_still_has_the_hooks():
    """Where this fails, TRL has moved what :mod:`fedward.server.central.ppo_trainer` wraps."""
    hooks: dict[str, list[str]] = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "create_optimizer": ["self", "model"],
    }
    for name, expected in hooks.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == expected


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    base = build_base(folder / "base")
    step = make_step(base, folder, "ppo", train={"critic_learning_rate": 0.02})
    return build(step, base, folder / "checkpoints")


@pytest.fixture(scope="module")
def batch(trainer):
    trainer.model.train()
    rows = [dict(row) for row in trainer.train_dataset for _ in range(2)][:4]
    seen = dict[str, Tensor]()
    with pytest.MonkeyPatch.context() as patch:

        def score(self: Any, *_: Any) -> Tensor:
            seen["rewards"] = torch.tensor([[1.0], [0.0], [float("nan")], [2.0]])
            return seen["rewards"]

        patch.setattr(GRPOTrainer, "_calculate_rewards", score)
        return trainer._generate_and_score_completions(rows)


class TestTheTrainer:
    def test_each_token_has_an_advantage_a_value_and_a_return(self, batch):
        shape = batch["completion_ids"].shape
        for key in ("advantages", "values", "returns", "scored"):
            assert batch[key].shape == shape
        assert {"old_per_token_logps", "ref_per_token_logps"} <= batch.keys()

    def test_returns_are_the_scores_at_the_end(self, batch):
        """With discount 1 and no divergence yet, what remains at the last token is the score."""
        last = batch["completion_mask"].sum(dim=1).long() - 1
        found = batch["returns"][torch.arange(4), last]
        assert found[[0, 1, 3]].tolist() == pytest.approx([1.0, 0.0, 2.0], abs=1e-5)

    def test_what_nothing_scored_teaches_nothing(self, batch):
        assert not batch["scored"][2].any()
        assert not batch["advantages"][2].any()
        assert batch["scored"][0].any()

    def test_the_critic_learns_and_the_divergence_is_counted_once(self, trainer, batch):
        beta = trainer.beta
        assert beta > 0
        trainer.critic.zero_grad(set_to_none=True)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        assert trainer.beta == beta
        assert "kl" not in trainer._metrics["train"]  # TRL's term was off
        assert trainer._metrics["train"]["value_loss"]
        graded = [p for p in trainer.critic.parameters() if p.requires_grad]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in graded)

    def test_the_critic_has_a_rate_of_its_own(self, trainer):
        optimizer = trainer.create_optimizer()
        assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.02}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert all(id(p) in held for p in trainer.critic.parameters() if p.requires_grad)
        again = trainer.create_optimizer()
        assert len(again.param_groups) == len(optimizer.param_groups)

    def test_it_is_trls_trainer(self, trainer):
        assert isinstance(trainer, PPOTrainer)
        assert isinstance(trainer, GRPOTrainer)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"num_iterations": 1}, "expected 2 or more"),
        ({"gae_lambda": 1.5}, "gae_lambda: expected above 0 to 1"),
        ({"value_clip": 0.0}, "value_clip: expected a number above 0"),
        ({"beta": -1.0}, "beta: expected 0 or more"),
    ],
)
def test_values_out_of_range(tmp_path, train, message):
    step = make_step(tmp_path / "none", tmp_path, "ppo", train=train)
    with pytest.raises(ConfigurationError, match=message):
        settings(step, tmp_path)


def test_a_checkpoint_inside_a_generation_is_refused(tmp_path):
    base = build_base(tmp_path / "base")
    step = make_step(base, tmp_path, "ppo", train={"save_steps": 3})
    with pytest.raises(ConfigurationError, match="expected a multiple of 2"):
        build(step, base, tmp_path / "checkpoints")
