"""Adapter files and flat vectors without a model: for the agent and the coordinator's rounds.

An adapter's state is a safetensors file. Its trainable tensors, in the order of a layout, are the
flat vector that sites update and sums move; the rest (A under ``ffa``) is carried along unchanged.
A server optimizer's moments lie in the same file, so that whatever binds, keeps or sends an adapter
does so for them too; who loads it into a model leaves them out.
"""

import json
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedward.canonical import canonical_json
from fedward.errors import ModelError

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of the trainable tensors, sorted by name."""

Vector = npt.NDArray[np.float32]

MOMENT = "server_optimizer."
"""What the names of the server optimizer's moments begin with in an adapter file."""


def layout_to_bytes(layout: Layout) -> bytes:
    """Canonical JSON of a layout."""
    return canonical_json(layout)


def layout_from_bytes(data: bytes) -> Layout:
    """Read a layout strictly.

    Raises:
        ModelError: Malformed, not sorted, or a name twice.
    """
    try:
        entries = json.loads(data)
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in entries)
        canonical = layout_to_bytes(layout) == data and all(n >= 0 for _, s in layout for n in s)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError("a layout is malformed") from error
    names = [name for name, _ in layout]
    if names != sorted(set(names)) or not canonical:
        raise ModelError("a layout must be canonical, sorted by name, each name once")
    return layout


def dimension(layout: Layout) -> int:
    """Coordinates of the flat vector."""
    return sum(math.prod(shape) for _, shape in layout)


def vector_of(adapter: bytes, layout: Layout) -> Vector:
    """The trainable tensors of an adapter as one vector.

    Args:
        adapter: Safetensors bytes.
        layout: Which tensors, in which order.

    Returns:
        ``(d,)`` float32, a copy.

    Raises:
        ModelError: Not safetensors, or a tensor is missing or of another shape or type.
    """
    tensors = _load(adapter)
    for name, shape in layout:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
            raise ModelError(f"the adapter's tensor {name!r} is not float32 of shape {shape}")
    if not layout:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([tensors[name].ravel() for name, _ in layout])


def moments_of(adapter: bytes) -> dict[str, Vector]:
    """The server optimizer's moments by name, copies; empty at the start of a run.

    Raises:
        ModelError: Not safetensors, or a moment is not float32 or not finite.
    """
    if not _has_moments(adapter):
        return {}
    moments = {n.removeprefix(MOMENT): t for n, t in _load(adapter).items() if n.startswith(MOMENT)}
    for name, moment in moments.items():
        if moment.dtype != np.float32 or not np.isfinite(moment).all():
            raise ModelError(f"the server optimizer's moment {name!r} is not finite float32")
    return moments


def without_moments(adapter: bytes) -> bytes:
    """What of an adapter file belongs to the model; the very file where that is all of it."""
    if not _has_moments(adapter):
        return adapter
    tensors = _load(adapter)
    return save({name: tensors[name] for name in sorted(tensors) if not name.startswith(MOMENT)})


def replace_vector(
    adapter: bytes, layout: Layout, vector: Vector, moments: Mapping[str, Vector] | None = None
) -> bytes:
    """The adapter with its trainable tensors replaced; equal inputs give equal bytes.

    Args:
        adapter: Safetensors bytes.
        layout: Which tensors, in which order.
        vector: ``(d,)`` float32.
        moments: The server optimizer's, which replace those that the file has.

    Raises:
        ModelError: Not safetensors, or the vector does not fill the layout exactly.
    """
    if vector.shape != (dimension(layout),) or vector.dtype != np.float32:
        raise ModelError(
            f"expected a float32 vector of {dimension(layout)} numbers, "
            f"got {vector.dtype} of shape {vector.shape}"
        )
    tensors, start = _load(adapter), 0
    for name, shape in layout:
        end = start + math.prod(shape)
        tensors[name] = vector[start:end].reshape(shape)
        start = end
    tensors |= {MOMENT + name: moment for name, moment in (moments or {}).items()}
    return save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})


def _load(adapter: bytes) -> dict[str, npt.NDArray[np.float32]]:
    try:
        return load(adapter)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError("an adapter is not a safetensors file") from error


def _has_moments(adapter: bytes) -> bool:
    """Whether the header of an adapter file names one: what it names else is not read."""
    try:
        names = json.loads(adapter[8 : 8 + int.from_bytes(adapter[:8], "little")])
        return any(name.startswith(MOMENT) for name in names)
    except (ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise ModelError("an adapter is not a safetensors file") from error
