"""The masked-input stage of Flower 1.41's SecAgg+, by Flower's own functions.

Step by step what ``secaggplus_mod._collect_masked_vectors`` does between its messages, without key
agreement and decryption.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.common import ndarray_to_bytes
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

Arrays = list[npt.NDArray[Any]]

TENSOR = 1 << 18
"""Coordinates of one tensor: a LoRA matrix of rank 64 at width 4096."""

# Flower's defaults.
_CLIPPING, _QUANTISATION, _MODULUS = 8.0, 1 << 22, 1 << 32


def mask(update: npt.NDArray[np.float32], seeds: Sequence[bytes]) -> Arrays:
    """Quantise an update and put one self mask and the pair masks on it.

    Args:
        update: ``(d,)``.
        seeds: The self mask's, then one a neighbour; 32 bytes each.
    """
    tensors: Arrays = np.split(update, range(TENSOR, len(update), TENSOR))
    vectors: Arrays = [*quantize(parameters_multiply(tensors, 1.0), _CLIPPING, _QUANTISATION)]
    masked: Arrays = factor_combine(_QUANTISATION, vectors)
    shapes = get_parameters_shape(masked)
    masked = parameters_addition(masked, [*pseudo_rand_gen(seeds[0], _MODULUS, shapes)])
    for place, seed in enumerate(seeds[1:]):
        operation = parameters_addition if place % 2 else parameters_subtraction
        masked = operation(masked, [*pseudo_rand_gen(seed, _MODULUS, shapes)])
    return parameters_mod(masked, _MODULUS)


def remove_mask(masked: Arrays, seed: bytes) -> Arrays:
    """What the server does for each mask."""
    found = pseudo_rand_gen(seed, _MODULUS, get_parameters_shape(masked))
    return parameters_subtraction(masked, [*found])


def serialise(masked: Arrays) -> list[bytes]:
    """What goes into the reply."""
    return [ndarray_to_bytes(array) for array in masked]
