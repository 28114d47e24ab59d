"""One entry for every scheme: what a site sends of its update, what a mean makes of the adapter."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.aggregation.fixed_point import clip_update
from fedward.aggregation.planned import METRIC_SLOTS
from fedward.aggregation.schemes import Layout, Vector, round_layout
from fedward.aggregation.server_optimizer import Moments, next_state
from fedward.aggregation.sketch import check_rebuilt, rebuild, sketch, sketched_words
from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import ProtocolError
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The plan's rule in one round.

    Args:
        settings: The plan's ``[aggregation]``.
        layout: All trainable tensors of the run.
        attempt: Any attempt at the round.
    """

    settings: Aggregation
    layout: Layout
    attempt: Attempt

    @property
    def trained(self) -> Layout:
        """The tensors that the round trains: the order of the vectors below."""
        return round_layout(self.layout, self.settings.scheme, self.attempt.round)

    @property
    def recomputes(self) -> bool:
        """Whether a site makes the next adapter from the mean alone, to the last bit."""
        return self.settings.scheme != "sketch-once"

    @property
    def words(self) -> int:
        """Length of what a site sends."""
        if not self.recomputes:
            return sketched_words(self.trained)
        return sum(int(np.prod(shape, dtype=np.int64)) for _, shape in self.trained)

    def to_send(self, update: Vector) -> Vector:
        """What a site puts into the sum: L2 norm at most ``update_clip``.

        Args:
            update: ``(d,)`` float32.

        Returns:
            ``(words,)`` float32.
        """
        clip = self.settings.update_clip
        if not self.recomputes:
            update = sketch(update, self.trained, self._key, clip)
        return clip_update(update, clip)

    def advance(
        self, start: Vector, moments: Moments, mean: npt.NDArray[np.float64]
    ) -> tuple[Vector, dict[str, Vector]]:
        """The next trained parameters and moments, for the coordinator.

        Args:
            start: ``(d,)`` float32.
            moments: The server optimizer's, empty in the first round.
            mean: ``(words,)`` float64.
        """
        if self.recomputes:
            return next_state(start, moments, mean, self.settings)
        return rebuild(start, mean, self.trained, self._key, self.settings.update_clip), {}

    def accept(
        self,
        start: Vector,
        moments: Moments,
        mean: npt.NDArray[np.float64],
        published: Vector | None,
    ) -> tuple[Vector, dict[str, Vector]]:
        """What the next trained parameters must be, for a site.

        Args:
            start: ``(d,)`` float32, as the site had them.
            moments: Those of the round before.
            mean: ``(words,)`` float64, of the published sum.
            published: What the coordinator says they are; needed by rules that are not recomputed
                to the last bit.

        Raises:
            ProtocolError: The published parameters are not what the mean gives, or are missing.
        """
        if self.recomputes:
            return next_state(start, moments, mean, self.settings)
        if published is None:
            raise ProtocolError(f"a task of {self.settings.scheme!r} needs the adapter")
        clip = self.settings.update_clip
        check_rebuilt(start, mean, self.trained, self._key, clip, published)
        return published, {}

    @property
    def _key(self) -> bytes:
        return digest("sketch", self.attempt.run, self.attempt.round.to_bytes(4, "big"))


def masked_bytes(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Bytes of masked words that each site sends in an odd and in an even round.

    The letters of a session come on top: a few kilobytes, and more with more sites.

    Args:
        plan: The plan.
        layout: All trainable tensors.
    """
    slots = len(METRIC_SLOTS) if plan.metrics else 0
    attempts = (Attempt(run="announced", round=number) for number in (1, 2))
    rules = (Rule(settings=plan.aggregation, layout=layout, attempt=each) for each in attempts)
    odd, even = ((rule.words + slots) * plan.aggregation.word_bits // 8 for rule in rules)
    return odd, even
