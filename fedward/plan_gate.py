"""``[gate]`` of a plan: rounds that hurt are refused."""

import math
from dataclasses import dataclass

from fedward.errors import require


@dataclass(frozen=True, kw_only=True)
class Gate:
    """``[gate]``: the coordinator tries each round's adapter on its own records, and refuses some.

    A refused round keeps the adapter that it began with. It counts as a round, and sites have paid
    for it.

    Args:
        data: File of held-out records that the coordinator may use, in the plan's columns.
        worse_by: The most by which the next adapter's mean loss on them may be above the lowest
            that the run has had, >= 0.
        norm: The most that the L2 norm of the mean update may be, > 0; left out, any that
            ``update_clip`` allows.
        refusals: Refused rounds in a row after which the run pauses, 1 to 1000.
    """

    data: str
    worse_by: float = 0.1
    norm: float | None = None
    refusals: int = 3

    def __post_init__(self) -> None:
        """Check every limit."""
        require(bool(self.data), "data", self.data, "a file of records")
        require(0 <= self.worse_by < math.inf, "worse_by", self.worse_by, "0 or more")
        if self.norm is not None:
            require(0 < self.norm < math.inf, "norm", self.norm, "a number above 0")
        require(1 <= self.refusals <= 1000, "refusals", self.refusals, "1 to 1000 rounds")
