"""How a decoded sum becomes the next adapter. Sites recompute every rule bit for bit.

A scheme is a pair of pure functions, ``init`` and ``apply``, on the flat vector of exactly the
parameters that are trained and sent. Which parameters those are is the tuner's business: ``fedavg``
sends every trainable tensor, ``ffa`` trains and sends LoRA's B alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedward.errors import ProtocolError

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class State:
    """What a scheme carries from one round to the next.

    Args:
        vector: ``(d,)`` float32: the trained parameters.
    """

    vector: Vector


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """An aggregation rule.

    Args:
        rule: Its name as the task hash binds it.
        init: From the first adapter's vector to the first state.
        apply: From a state and the mean update, ``(d,)`` float64, to the next state.
    """

    rule: str
    init: Callable[[Vector], State]
    apply: Callable[[State, npt.NDArray[np.float64]], State]


def fedavg() -> Scheme:
    """Mean of the updates of every trainable tensor (McMahan et al. 2017, Algorithm 1).

    All sites weigh alike: a weight by data size would have to be known to the coordinator.
    """
    return Scheme(rule="fedavg", init=_start, apply=_add_mean)


def ffa() -> Scheme:
    """Mean of the updates of LoRA's B while A stays frozen (Sun et al. 2024, FFA-LoRA, section 4).

    The mean of B_k·A is the product of the mean B with A, so the rule is exact on the weights, and
    noise enters linearly.
    """
    return Scheme(rule="ffa", init=_start, apply=_add_mean)


def next_vector(start: Vector, mean: npt.NDArray[np.float64]) -> Vector:
    """``float32(float64(start) + mean)``, element by element.

    Element-wise float64 has one result on every machine (IEEE 754), so a site that knows the sum
    knows the next adapter, and a coordinator cannot slip in another one.

    Args:
        start: ``(d,)`` float32: what the updates were computed from.
        mean: ``(d,)`` float64.

    Raises:
        ProtocolError: Different shapes, or a start that is not float32.

    >>> next_vector(np.float32([1.0, 2.0]), np.array([0.5, -0.25])).tolist()
    [1.5, 1.75]
    """
    if start.shape != mean.shape or start.dtype != np.float32:
        raise ProtocolError(
            f"expected a float32 vector of shape {mean.shape}, got {start.dtype} of {start.shape}"
        )
    return (start.astype(np.float64) + mean).astype(np.float32)


def _start(vector: Vector) -> State:
    return State(vector=vector)


def _add_mean(state: State, mean: npt.NDArray[np.float64]) -> State:
    return State(vector=next_vector(state.vector, mean))
