"""What a session ends in: the public sum, with the proof of what it is a sum of."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.aggregation.masks import Words
from fedward.aggregation.packing import unpack
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.transcript import Outcome
from fedward.canonical import digest


@dataclass(frozen=True, kw_only=True)
class SumResult:
    """A session's sum, public to its cohort.

    Args:
        parameters: What the session was about.
        words: ``(d,)``: the sum of the survivors' inputs modulo 2^w, read-only.
        outcome: Session and survivors; a site compares it with :attr:`SiteSession.outcome`.
        certificate: The survivor certificate, as sites received it.
    """

    parameters: SessionParameters
    words: Words
    outcome: Outcome
    certificate: bytes

    @property
    def cohort(self) -> tuple[int, ...]:
        """The sites in the sum, ascending."""
        return self.outcome.survivors

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """``(dimension,)`` float64: the mean update over the cohort, by the session's weights."""
        total, _ = unpack(self.words, self.parameters)
        total /= self.parameters.divisor(self.cohort)
        return total

    @property
    def slots(self) -> dict[str, float]:
        """The sum of each slot over the cohort, by name."""
        return unpack(self.words, self.parameters)[1]

    @property
    def transcript(self) -> bytes:
        """32 bytes over session, survivors, certificate and sum, for the audit log."""
        outcome, total = self.outcome, hashlib.sha256(self.words.data).digest()
        return digest("sum", outcome.session, outcome.survivors_hash, self.certificate, total)
