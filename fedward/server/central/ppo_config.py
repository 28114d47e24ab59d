"""``[train]`` of the stage ``ppo``: TRL's keys of ``grpo``, and those of value and advantage."""

from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig


@dataclass
class PPOConfig(GRPOConfig):
    """PPO (Schulman et al. 2017, arXiv 1707.06347) for language models (Stiennon et al. 2020).

    Args:
        beta: Weight of the divergence from the reference in the reward, 0 or more.
        num_iterations: Optimizer passes over one generation, 2 or more.
        loss_type: The policy's clipped loss as TRL averages it.
        discount: Of later rewards, above 0 to 1.
        gae_lambda: Between one step (0) and the whole completion (1) (Schulman et al. 2015,
            arXiv 1506.02438, equation 16).
        value_weight: Of the critic's loss beside the policy's, above 0.
        value_clip: How far one generation's passes may move a value, above 0.
        critic_learning_rate: The critic's own rate, above 0; at the policy's it oscillates or is
            slow.
    """

    beta: float = 0.05
    num_iterations: int = 2
    loss_type: str = "bnpo"
    discount: float = field(default=1.0)
    gae_lambda: float = field(default=0.95)
    value_weight: float = field(default=0.5)
    value_clip: float = field(default=0.2)
    critic_learning_rate: float = field(default=1e-4)

    def __post_init__(self) -> None:
        """Check every limit."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # theirs
        if self.num_iterations < 2:
            raise ValueError("num_iterations: expected 2 or more, or nothing is there to clip")
        for name in ("discount", "gae_lambda"):
            if not 0 < vars(self)[name] <= 1:
                raise ValueError(f"{name}: expected above 0 to 1, got {vars(self)[name]}")
        for name in ("value_weight", "value_clip", "critic_learning_rate"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name}: expected a number above 0, got {vars(self)[name]}")
        if self.beta < 0:
            raise ValueError(f"beta: expected 0 or more, got {self.beta}")
