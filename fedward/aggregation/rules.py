"""One entry for every scheme: what a site sends of its update, what a mean makes of the adapter."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.aggregation import two_pass
from fedward.aggregation.coordinates import Sent, count_sent, draw_sent
from fedward.aggregation.fixed_point import clip_update
from fedward.aggregation.planned import METRIC_SLOTS
from fedward.aggregation.schemes import Layout, Vector, round_layout
from fedward.aggregation.server_optimizer import Moments, next_part, next_state
from fedward.aggregation.sketch import check_rebuilt, rebuild, sketch, sketched_words
from fedward.aggregation.two_pass import Second, clip_of_second
from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import ProtocolError
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The plan's rule in one session of a round.

    Args:
        settings: The plan's ``[aggregation]``.
        layout: All trainable tensors of the run.
        attempt: Any attempt at the round, in the session that is meant where there are two passes.
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
        return self.settings.scheme not in {"sketch", "sketch-once"}

    @property
    def passes(self) -> int:
        """Sessions that a round has, one after another, over the same sites."""
        return 2 if self.settings.scheme == "sketch" else 1

    @property
    def again(self) -> bool:
        """Whether the attempt's session is a second pass: odd ones are first, even ones second."""
        return self.passes == 2 and self.attempt.session % 2 == 0

    @property
    def words(self) -> int:
        """Length of what a site sends in the attempt's session."""
        if self.settings.scheme == "sketch-once":
            return sketched_words(self.trained)
        if self.passes == 2:
            count = two_pass.words_of_second if self.again else two_pass.words_of_first
            return count(self.trained)
        return count_sent(self._dimension, self.settings.coordinates)

    def to_send(self, update: Vector, basis: Vector | None = None) -> Vector:
        """What a site puts into the sum: L2 norm at most ``update_clip``, or its second pass's.

        Args:
            update: ``(d,)`` float32.
            basis: In a second pass: the published one, checked.

        Returns:
            ``(words,)`` float32.
        """
        clip = self.settings.update_clip
        if self.settings.scheme == "sketch-once":
            update = sketch(update, self.trained, self._key, clip)
        elif basis is not None:
            update = two_pass.second_pass(update, self.trained, basis, self._key, clip)
            clip = clip_of_second(clip)
        elif self.passes == 2:
            update = two_pass.first_pass(update, self.trained, self._key, clip)
        update, sent = clip_update(update, clip), self._sent
        return update if sent is None else update[sent]

    def basis(self, mean: npt.NDArray[np.float64]) -> Vector:
        """What the second pass asks of sites, from the mean of the first, for the coordinator."""
        return two_pass.basis_of(mean, self.trained, self._key)

    def check_basis(self, mean: npt.NDArray[np.float64], basis: Vector) -> None:
        """Check what a second pass asks, for a site.

        Raises:
            ProtocolError: It is not a basis of what the first pass's mean gives.
        """
        two_pass.check_basis(mean, self.trained, self._key, basis)

    def advance(
        self,
        start: Vector,
        moments: Moments,
        mean: npt.NDArray[np.float64],
        second: Second | None = None,
    ) -> tuple[Vector, dict[str, Vector]]:
        """The next trained parameters and moments, for the coordinator.

        Args:
            start: ``(d,)`` float32.
            moments: The server optimizer's, empty in the first round.
            mean: ``(words,)`` float64, of the first pass.
            second: Of the second pass, if there is one.
        """
        clip = self.settings.update_clip
        if self.recomputes:
            return self._next(start, moments, mean)
        if second is not None:
            return two_pass.rebuild(start, mean, self.trained, second), {}
        return rebuild(start, mean, self.trained, self._key, clip), {}

    def accept(
        self,
        start: Vector,
        moments: Moments,
        mean: npt.NDArray[np.float64],
        published: Vector | None,
        second: Second | None = None,
    ) -> tuple[Vector, dict[str, Vector]]:
        """What the next trained parameters must be, for a site.

        Args:
            start: ``(d,)`` float32, as the site had them.
            moments: Those of the round before.
            mean: ``(words,)`` float64, of the published sum of the first pass.
            published: What the coordinator says they are; needed by rules that are not recomputed
                to the last bit.
            second: Of the published sum of the second pass, if there is one.

        Raises:
            ProtocolError: The published parameters are not what the mean gives, or are missing.
        """
        if self.recomputes:
            return self._next(start, moments, mean)
        if published is None:
            raise ProtocolError(f"a task of {self.settings.scheme!r} needs the adapter")
        if second is not None:
            two_pass.check_rebuilt(start, mean, self.trained, second, published)
        else:
            clip = self.settings.update_clip
            check_rebuilt(start, mean, self.trained, self._key, clip, published)
        return published, {}

    def _next(
        self, start: Vector, moments: Moments, mean: npt.NDArray[np.float64]
    ) -> tuple[Vector, dict[str, Vector]]:
        if (sent := self._sent) is None:
            return next_state(start, moments, mean, self.settings)
        return next_part(start, moments, mean, self.settings, sent)

    @property
    def _dimension(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for _, shape in self.trained)

    @property
    def _sent(self) -> Sent | None:
        """Which numbers the round sends; None: all."""
        share = self.settings.coordinates
        return None if share == 1 else draw_sent(self._dimension, share, self.attempt)

    @property
    def _key(self) -> bytes:
        return digest("sketch", self.attempt.run, self.attempt.round.to_bytes(4, "big"))


def masked_bytes(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Bytes of masked words that each site sends in an odd and in an even round, in all passes.

    The letters of a session come on top: a few kilobytes, and more with more sites.

    Args:
        plan: The plan.
        layout: All trainable tensors.
    """
    slots = len(METRIC_SLOTS) if plan.metrics else 0

    def words(number: int) -> int:
        attempts = (Attempt(run="announced", round=number, session=s) for s in (1, 2))
        rules = [Rule(settings=plan.aggregation, layout=layout, attempt=each) for each in attempts]
        return slots + sum(rule.words for rule in rules[: rules[0].passes])

    return words(1) * plan.aggregation.word_bits // 8, words(2) * plan.aggregation.word_bits // 8
