"""What the sessions of a round came to: one sum, those of two passes, or one of each group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.aggregation.groups import middle
from fedward.aggregation.packing import check_mean
from fedward.aggregation.published import SumResult
from fedward.aggregation.two_pass import Second
from fedward.canonical import Json
from fedward.tuning.vector import Vector

Mean = npt.NDArray[np.float64]
"""``(words,)``: what a rule of aggregation starts from."""


@dataclass(frozen=True, kw_only=True)
class Summed:
    """A round's sums.

    Args:
        results: At least one; of two passes the first one's before the second's.
        basis: What the second pass was asked for; None where there was none.
        dealt: Sites that were dealt to groups; empty where there were none.
    """

    results: tuple[SumResult, ...]
    basis: Vector | None = None
    dealt: tuple[int, ...] = ()

    @property
    def first(self) -> SumResult:
        """Where the round's metrics are, and its updates themselves."""
        return self.results[0]

    def means(self, update_clip: float) -> tuple[Mean, Second | None]:
        """The mean of the sum, or the median over the groups', and the second pass.

        Raises:
            SumTooLong: Some site of a cohort sent more than the plan allows.
        """
        means = [checked_mean(result, update_clip) for result in self.results]
        if self.basis is None:
            return middle(means), None
        return means[0], Second(basis=self.basis, mean=means[1])

    def facts(self, put_blob: Callable[[bytes], str]) -> Mapping[str, Json]:
        """What an event says of the sums; the words themselves lie in blobs.

        ``groups`` are who was dealt, and then the cohorts, in the order in which ``sum`` has the
        words of each.
        """
        last, cohorts = self.results[-1], [list(result.cohort) for result in self.results]
        if self.basis is not None:
            return {
                "sum": put_blob(last.words.tobytes()),
                "first": put_blob(self.first.words.tobytes()),
                "basis": put_blob(self.basis.tobytes()),
                "cohort": cohorts[-1],
                "transcript": last.transcript.hex(),
            }
        facts: dict[str, Json] = {
            "sum": put_blob(b"".join(result.words.tobytes() for result in self.results)),
            "cohort": sorted(site for cohort in cohorts for site in cohort),
            "transcript": last.transcript.hex(),
        }
        if self.dealt:
            facts["groups"] = [list(self.dealt), *cohorts]
            facts["transcript"] = [result.transcript.hex() for result in self.results]
        return facts

    @property
    def slots(self) -> dict[str, float]:
        """The sum of each metric over all sites, by name."""
        parts = self.results if self.basis is None else self.results[:1]
        each = [part.slots for part in parts]
        return {name: sum(slots[name] for slots in each) for name in each[0]}


def checked_mean(result: SumResult, update_clip: float) -> Mean:
    """The mean of one sum.

    Raises:
        SumTooLong: Some site of its cohort sent more than the plan allows.
    """
    check_mean(result.mean, result.parameters, result.cohort, update_clip)
    return result.mean
