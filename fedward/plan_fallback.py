"""``[fallback]`` of a plan: what happens when too few sites come."""

import re
from dataclasses import dataclass

from fedward.errors import require


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """``[fallback]``: when too few sites come, the coordinator completes a round by itself.

    Args:
        after: Attempts in a row that missed the minimum of sites, 1 to 1000.
        job: A job of ``fedward train``: the coordinator's own training, from the last adapter.
        adapter: Hex digest of the adapter that this training made. The coordinator fills it in for
            sites, which approve the plan anew with it; a file leaves it out.
    """

    after: int
    job: str
    adapter: str | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        require(1 <= self.after <= 1000, "after", self.after, "1 to 1000 attempts")
        require(bool(self.job), "job", self.job, "a job's file")
        if self.adapter is not None:
            holds = re.fullmatch("[0-9a-f]{64}", self.adapter) is not None
            require(holds, "adapter", self.adapter, "64 lower-case hex digits")
