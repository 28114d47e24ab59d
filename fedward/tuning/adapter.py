"""The adapter of a model: its whole state for the task, its trainable part as one vector.

The state is every trainable parameter and every frozen one that the tuner added (LoRA's A under
``ffa``). It never comes from ``peft.get_peft_model_state_dict``, whose choice differs from what
is trained for several methods.
"""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fedward.errors import ModelError
from fedward.tuning.tuners import trainable
from fedward.tuning.vector import MOMENT, Layout

State = dict[str, Tensor]
"""Parameter name → float32 tensor on the CPU."""

_ADDED = (".lora_", ".modules_to_save.")
"""Parts of a name that PEFT gives to what it adds to a model."""

_SHARED = (".vera_A.", ".vera_B.")
"""The same of what it adds as buffers: frozen, and to be the same at every site."""


def adapter_state(model: nn.Module) -> State:
    """A copy of the adapter's whole state, sorted by name."""
    return {name: p.detach().cpu().clone() for name, p in _parts(model).items()}


def load_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the adapter of a model; nothing is changed unless everything fits.

    Raises:
        ModelError: A tensor is missing or unknown, has another shape, is not float32 or not finite.
    """
    parts = _parts(model)
    odd = sorted(parts.keys() ^ state.keys())
    if odd:
        known = "is missing from" if odd[0] in parts else "is not the model's but in"
        raise ModelError(f"the tensor {odd[0]!r} {known} the adapter")
    for name, part in parts.items():
        tensor = state[name]
        if tensor.shape != part.shape or tensor.dtype != torch.float32:
            raise ModelError(
                f"adapter tensor {name!r}: expected float32 of shape {tuple(part.shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(f"adapter tensor {name!r} has numbers that are not finite")
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(state[name])


def layout(model: nn.Module) -> Layout:
    """Names and shapes of the trainable tensors, in the order of :func:`flatten`."""
    return tuple((name, tuple(p.shape)) for name, p in trainable(model).items())


def flatten(model: nn.Module, names: Collection[str] | None = None) -> npt.NDArray[np.float32]:
    """The trainable parameters, or those named, as one vector, shape ``(d,)``."""
    chosen = (p for n, p in trainable(model).items() if names is None or n in names)
    parts = [p.detach().float().cpu().numpy().ravel() for p in chosen]
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])


def unflatten_into(model: nn.Module, vector: npt.NDArray[np.float32]) -> None:
    """Set the trainable parameters from what :func:`flatten` gave.

    Args:
        model: Changed in place.
        vector: ``(d,)`` float32.

    Raises:
        ModelError: The vector has another length or type, or numbers that are not finite.
    """
    parameters = trainable(model).values()
    expected = (sum(p.numel() for p in parameters),)
    if vector.shape != expected or vector.dtype != np.float32:
        raise ModelError(
            f"expected a float32 vector of shape {expected}, got {vector.dtype} of {vector.shape}"
        )
    if not np.isfinite(vector).all():
        raise ModelError("the vector has numbers that are not finite")
    values, start = torch.from_numpy(vector.copy()), 0
    with torch.no_grad():
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.copy_(values[start:end].view(parameter.shape))
            start = end


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes; equal states give equal bytes."""
    return save({name: state[name].contiguous() for name in sorted(state)})


def from_bytes(data: bytes) -> State:
    """Read exactly what :func:`to_bytes` writes; a server optimizer's moments are left out.

    Nothing is allocated beyond the size of ``data``: safetensors checks every offset against it.

    Raises:
        ModelError: Not safetensors, not float32, or another spelling of a state.
    """
    try:
        state = load(data)
    except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError("an adapter is not a safetensors file") from error
    wrong = [name for name, tensor in state.items() if tensor.dtype != torch.float32]
    if wrong:
        raise ModelError(f"adapter tensor {wrong[0]!r}: expected float32")
    if to_bytes(state) != data:
        raise ModelError("an adapter is not spelled as Fedward writes it (metadata or padding)")
    return {name: state[name] for name in sorted(state) if not name.startswith(MOMENT)}


def _parts(model: nn.Module) -> State:
    added: State = dict(trainable(model))
    for name, parameter in model.named_parameters():
        if any(part in name for part in _ADDED):
            added[name] = parameter
    for name, buffer in model.named_buffers():
        if any(part in f"{name}." for part in _SHARED):
            added[name] = buffer
    return dict(sorted(added.items()))
