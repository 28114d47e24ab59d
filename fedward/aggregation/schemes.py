"""How a decoded sum becomes the next adapter. Sites recompute the rule bit for bit.

Every scheme adds the mean update to the parameters that the round trained; which those are is said
by the tuner and by :func:`fedward.tuning.vector.round_layout`. ``fedavg`` trains and sends every trainable tensor (McMahan et al. 2017, Algorithm
1). ``ffa`` trains and sends LoRA's B alone (Sun et al. 2024, FFA-LoRA, section 4): the mean of
B_k·A is the product of the mean B with A, so the rule is exact on the weights, and noise enters
linearly. ``alternating`` sends B and A in turn: as exact, and the subspace moves.
"""

import numpy as np
import numpy.typing as npt

from fedward.errors import ProtocolError

Vector = npt.NDArray[np.float32]


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
