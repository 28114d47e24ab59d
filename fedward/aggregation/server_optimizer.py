"""Server optimizers: what a coordinator makes of the mean update, beyond adding it.

``momentum`` is FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.2); ``adam``, ``yogi`` and
``adagrad`` are Algorithm 2 of Reddi et al. 2021 (arXiv 2003.00295), the mean in the gradient's
place. Everything is element-wise: float64 inside, float32 from round to round, so that a site that
knows the sum computes the next adapter and the next moments bit for bit. Moments are functions of
published sums, and cost no privacy.

Where a round sends some numbers alone, the optimizer acts on these: the others and their moments
stay as they are, as if there had been no round for them. Nothing else would be right: of a number
that nobody sent, no mean is known, and to take it for 0 would let old moments move it on.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedward.aggregation.coordinates import Sent
from fedward.aggregation.schemes import Vector, next_vector
from fedward.errors import ProtocolError
from fedward.plan_aggregation import Aggregation

Moments = Mapping[str, Vector]
"""What an optimizer keeps between rounds: ``first`` and ``second``, each ``(d,)`` float32."""

_Numbers = npt.NDArray[np.float64]
_NAMES = {"none": (), "momentum": ("first",)}


def next_state(
    start: Vector, moments: Moments, mean: _Numbers, settings: Aggregation
) -> tuple[Vector, dict[str, Vector]]:
    """The next trained parameters and moments.

    Args:
        start: ``(d,)`` float32: what the updates were computed from.
        moments: Those after the round before; empty in the first.
        mean: ``(d,)`` float64, the mean update.
        settings: The plan's ``[aggregation]``.

    Raises:
        ProtocolError: Another shape, moments that are not this optimizer's, or a second moment
            below zero.
    """
    rate, kind = settings.server_learning_rate, settings.optimizer
    names = _NAMES.get(kind, ("first", "second"))
    if moments and tuple(sorted(moments)) != names:
        raise ProtocolError(f"expected the moments {names} of {kind!r}, got {sorted(moments)}")
    if kind == "none":
        return next_vector(start, mean if rate == 1.0 else rate * mean), {}
    now = {name: _numbers(moments, name, mean, settings) for name in names}
    first = settings.beta_1 * now["first"]
    first += mean if kind == "momentum" else (1 - settings.beta_1) * mean
    if kind == "momentum":
        return next_vector(start, rate * first), {"first": first.astype(np.float32)}
    second = _second(now["second"], mean * mean, settings)
    vector = next_vector(start, rate * first / (np.sqrt(second) + settings.tau))
    return vector, {"first": first.astype(np.float32), "second": second.astype(np.float32)}


def next_part(
    start: Vector, moments: Moments, mean: _Numbers, settings: Aggregation, sent: Sent
) -> tuple[Vector, dict[str, Vector]]:
    """As :func:`next_state`, of the numbers that a round has sent; the others stay.

    Args:
        start: ``(d,)`` float32.
        moments: ``(d,)`` each; empty in the first round.
        mean: ``(k,)`` float64: the mean of the numbers sent.
        settings: The plan's ``[aggregation]``.
        sent: ``(d,)``, True for ``k`` numbers.

    Raises:
        ProtocolError: As of :func:`next_state`.
    """
    if any(moment.shape != start.shape for moment in moments.values()):
        raise ProtocolError("the optimizer's moments do not fit the update")
    before = {name: moment[sent] for name, moment in moments.items()}
    part, now = next_state(start[sent], before, mean, settings)
    rest = {name: np.full_like(start, _first(name, settings)) for name in now}
    whole = {name: _with(moments.get(name, rest[name]), sent, now[name]) for name in now}
    return _with(start, sent, part), whole


def _with(vector: Vector, sent: Sent, part: Vector) -> Vector:
    vector = vector.copy()
    vector[sent] = part
    return vector


def _first(name: str, settings: Aggregation) -> float:
    """What a moment is before the first round: 0, and tau squared for the second."""
    return settings.tau * settings.tau if name == "second" else 0.0


def _numbers(moments: Moments, name: str, mean: _Numbers, settings: Aggregation) -> _Numbers:
    """One moment in float64."""
    if not moments:
        return np.full_like(mean, _first(name, settings))
    moment = moments[name].astype(np.float64)
    if moment.shape != mean.shape or (name == "second" and moment.min(initial=0.0) < 0):
        raise ProtocolError(f"the optimizer's {name} moment does not fit the update")
    return moment


def _second(second: _Numbers, square: _Numbers, settings: Aggregation) -> _Numbers:
    if settings.optimizer == "adagrad":
        return second + square
    if settings.optimizer == "yogi":
        return second - (1 - settings.beta_2) * square * np.sign(second - square)
    return settings.beta_2 * second + (1 - settings.beta_2) * square
