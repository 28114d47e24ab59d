"""The parts of a plan that say who is summed, and what a sum becomes (DESIGN §7)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedward import typed_toml
from fedward.errors import require


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """``[cohort]``: how many sites a sum needs.

    Args:
        minimum: Fewest sites in a sum, max(3, colluders + 2) to 100000.
        colluders: Sites that may work together with the coordinator, 0 or more.
        groups: 1, or 3 to 1000: sites are dealt to so many groups in each round, each group has a
            sum of its own, and the median of their means counts. The minimum then holds for
            each group; colluders are counted over all sites, because all of them may come to be in
            one group.
    """

    minimum: int = 3
    colluders: int = 1
    groups: int = field(default=1, metadata={typed_toml.LATER: True})

    def __post_init__(self) -> None:
        """Check every limit."""
        require(self.colluders >= 0, "colluders", self.colluders, "0 or more")
        lowest = max(3, self.colluders + 2)
        allowed = f"{lowest} to 100000 with {self.colluders} colluders"
        require(lowest <= self.minimum <= 100000, "minimum", self.minimum, allowed)
        require(self.groups in {1, *range(3, 1001)}, "groups", self.groups, "1, or 3 to 1000")


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """``[aggregation]``: what is summed and how it becomes the next adapter.

    The keys from ``optimizer`` to ``tau`` are those of
    :mod:`fedward.aggregation.server_optimizer`.

    Args:
        scheme: ``fedavg`` (every trainable tensor), ``ffa`` (LoRA's A frozen and orthonormal),
            ``alternating`` (A and B in turn, B first; A starts orthonormal), ``sketch`` (the mean
            of the products, from two sums over the same sites), or ``sketch-once`` (from one).
        update_clip: L2 bound of a site's update, 1e-12 to 1e15; fixes the fixed-point grid.
        word_bits: Bits of one word of the masked sum; 16 halve what a site sends.
        weights: Site name to its weight in the mean, a number above 0 for every site; left out,
            all weigh alike. No site may outweigh the ``minimum - 1 - colluders`` lightest others.
        optimizer: What the coordinator does with the mean: add it (``none``), or ``momentum``,
            ``adam``, ``yogi`` or ``adagrad`` over the rounds. Costs no privacy.
        server_learning_rate: The mean, or what the optimizer makes of it, is multiplied by this
            number, > 0.
        beta_1: Decay of the first moment, 0 <= beta_1 < 1; not for ``none``.
        beta_2: Decay of the second moment, 0 <= beta_2 < 1; for ``adam`` and ``yogi``.
        tau: What is added to the root of the second moment, 1e-9 to 1; not for ``momentum``.
        coordinates: Share of an update's numbers that each round sends, 0.001 to 1; with ``fedavg``
            and ``ffa``. The rounds take turns, by a public draw, so that about ``1 / coordinates``
            rounds send each number once; what is not sent stays as it is.
    """

    scheme: Literal["fedavg", "ffa", "alternating", "sketch", "sketch-once"] = "ffa"
    update_clip: float = 1.0
    word_bits: Literal[16, 32] = 32
    weights: Mapping[str, float] | None = field(default=None, hash=False)
    optimizer: Literal["none", "momentum", "adam", "yogi", "adagrad"] = "none"
    server_learning_rate: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    coordinates: float = field(default=1.0, metadata={typed_toml.LATER: True})

    def __post_init__(self) -> None:
        """Check every limit."""
        clip = self.update_clip  # a second pass has a grid for half its square, 1e-30 to 1e30
        require(1e-12 <= clip <= 1e15, "update_clip", clip, "1e-12 to 1e15")
        rate = self.server_learning_rate
        require(0 < rate <= 1e6, "server_learning_rate", rate, "above 0 and at most 1e6")
        require(0 <= self.beta_1 < 1, "beta_1", self.beta_1, "at least 0 and below 1")
        require(0 <= self.beta_2 < 1, "beta_2", self.beta_2, "at least 0 and below 1")
        require(1e-9 <= self.tau <= 1, "tau", self.tau, "1e-9 to 1")
        sketched = self.scheme in {"sketch", "sketch-once"}
        steady = not sketched and self.scheme != "alternating"
        allowed = f"'none' with {self.scheme!r}"
        require(steady or self.optimizer == "none", "optimizer", self.optimizer, allowed)
        allowed = f"1 with {self.scheme!r}"  # a product is not linear in its factors
        require(not sketched or rate == 1, "server_learning_rate", rate, allowed)
        share = self.coordinates
        require(1e-3 <= share <= 1, "coordinates", share, "0.001 to 1")
        # Products need both factors whole, and a cycle of rounds the same tensors in each of them.
        whole = share == 1 or self.scheme in {"fedavg", "ffa"}
        require(whole, "coordinates", share, f"1 with {self.scheme!r}")
        for name, weight in (self.weights or {}).items():
            holds = type(weight) is float and 1e-9 <= weight <= 1e9
            require(holds, f"weights.{name}", weight, "a number, 1e-9 to 1e9")
