"""The site's own limits. The site's word is the last: what its policy refuses is not trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedward import typed_toml
from fedward.errors import InvalidValue, PolicyRefusal
from fedward.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a site allows; read from TOML, without defaults that allow anything.

    Args:
        max_epsilon: Most that one patient may ever lose here, over all runs, > 0; ``inf`` only in
            a simulation.
        delta: The delta at which ``max_epsilon`` holds, above 0 and below 0.1.
        max_rounds: Most rounds (count + spare) of one run, at least 1.
        models: SHA-256 digests of the base models that may be trained.
        modes: Accepted modes of training together.
        objectives: Accepted objectives.
        minimum: Fewest sites in a sum, at least 3.
        colluders: Colluding sites that the plan must allow for, 0 or more.
        approved: Hex hashes of approved plans; empty with ``automatic``.
        automatic: Whether a plan within these limits needs no approval of its own.
    """

    max_epsilon: float
    delta: float
    max_rounds: int
    models: tuple[str, ...]
    modes: tuple[str, ...] = ("local",)
    objectives: tuple[str, ...] = ("sft", "classify")
    minimum: int = 3
    colluders: int = 0
    approved: tuple[str, ...] = ()
    automatic: bool = False

    def __post_init__(self) -> None:
        """Check every limit."""
        if not self.max_epsilon > 0:
            raise InvalidValue("max_epsilon", self.max_epsilon, "a number above 0")
        if not 0 < self.delta < 0.1:
            raise InvalidValue("delta", self.delta, "above 0 and below 0.1")
        for key, value, low in (
            ("max_rounds", self.max_rounds, 1),
            ("minimum", self.minimum, 3),
            ("colluders", self.colluders, 0),
        ):
            if value < low:
                raise InvalidValue(key, value, f"at least {low}")

    def check(self, plan: Plan) -> None:
        """Compare a plan with every limit.

        Raises:
            PolicyRefusal: With every reason at once.
        """
        reasons = list(self._reasons(plan))
        if reasons:
            raise PolicyRefusal(reasons)

    def _reasons(self, plan: Plan) -> Iterator[str]:
        privacy, rounds, cohort = plan.privacy, plan.rounds, plan.cohort
        epsilon = privacy.epsilon + (plan.metrics.epsilon if plan.metrics else 0.0)
        if epsilon > self.max_epsilon:
            yield f"epsilon {epsilon:g} is above max_epsilon = {self.max_epsilon:g}"
        if privacy.delta > self.delta:
            yield f"delta {privacy.delta:g} is above delta = {self.delta:g}"
        if rounds.count + rounds.spare > self.max_rounds:
            total = rounds.count + rounds.spare
            yield f"{total} rounds with spares are above max_rounds = {self.max_rounds}"
        if plan.model.sha256 not in self.models:
            yield f"the base model {plan.model.sha256} is not in models"
        if plan.mode not in self.modes:
            yield f"mode {plan.mode!r} is not in modes"
        if plan.task.objective not in self.objectives:
            yield f"objective {plan.task.objective!r} is not in objectives"
        if cohort.minimum < self.minimum:
            yield f"a cohort of {cohort.minimum} is below minimum = {self.minimum}"
        if cohort.colluders < self.colluders:
            yield f"{cohort.colluders} colluders are below colluders = {self.colluders}"
        if not self.automatic and plan.hash().hex() not in self.approved:
            yield f"plan {plan.hash().hex()} is not in approved, and automatic is off"


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigurationError: Missing file (no policy, no training), or an invalid value.
    """
    return typed_toml.load(Policy, path)
