"""How a decoded sum becomes the next adapter. Sites recompute the rule bit for bit.

Every scheme adds the mean update to the parameters that the round trained; which those are is said
by the tuner and by :func:`round_layout`. ``fedavg`` trains and sends every trainable tensor
(McMahan et al. 2017, Algorithm 1). ``ffa`` trains and sends LoRA's B alone (Sun et al. 2024,
FFA-LoRA, section 4): the mean of B_k·A is the product of the mean B with A, so the rule is exact on
the weights, and noise enters linearly. ``alternating`` sends B and A in turn: as exact, and the
subspace moves.
``sketch-once`` sends sketches of the products (:mod:`fedward.aggregation.sketch`).
"""

import numpy as np
import numpy.typing as npt

from fedward.errors import ProtocolError

Vector = npt.NDArray[np.float32]

_PIECE = 1 << 16

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of trainable tensors, in the order of a vector."""


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
    result = np.empty_like(start)
    for begin in range(0, start.size, _PIECE):  # whole float64 copies cost more than the sums
        piece = slice(begin, begin + _PIECE)
        result[piece] = start[piece].astype(np.float64) + mean[piece]
    return result


def round_layout(layout: Layout, scheme: str, number: int) -> Layout:
    """The tensors that a round trains and sums.

    Under ``alternating`` (RoLoRA, Chen et al. 2024, arXiv 2409.02346) odd rounds leave LoRA's A
    alone and even ones its B, because a product is linear in one factor: the mean of B_k·A is the
    mean B times A. It starts with B, whose zeros leave A no gradient.

    Args:
        layout: All that the run trains.
        scheme: The plan's.
        number: The round, from 1.
    """
    if scheme != "alternating":
        return layout
    resting = ".lora_A." if number % 2 else ".lora_B."
    return tuple((name, shape) for name, shape in layout if resting not in name)
