"""Which trainable parameters the single-backward engine covers, decided before a run starts.

What it does not cover goes to the exact loop, one unit a backward pass. What no clipping can make
private (layers that keep statistics of the batch, half-precision parameters) is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from fedward.errors import UncoveredParameters

_WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, OptimizedModule)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How a model's trainable parameters get their per-unit gradients.

    Args:
        parameters: Names of all trainable parameters, in the model's order.
        obstacles: Why one backward pass cannot give the gradients of many units, each a sentence;
            empty if it can.
    """

    parameters: tuple[str, ...]
    obstacles: tuple[str, ...]

    @property
    def single_pass(self) -> bool:
        """Whether one backward pass serves a whole batch; else each unit has its own."""
        return not self.obstacles

    def __str__(self) -> str:
        """One line for people."""
        count = f"{len(self.parameters)} trainable tensors"
        if self.single_pass:
            return f"{count}, clipped per unit in one backward pass"
        first, *others = self.obstacles
        more = f" (and {len(others)} more)" if others else ""
        return f"{count}, one backward pass a unit, slower, because {first}{more}"


def coverage(model: nn.Module) -> Coverage:
    """Decide how a model's per-unit gradients are computed.

    Raises:
        UncoveredParameters: Nothing is trainable, a trainable parameter is sharded or not float32,
            a wrapper would sum or compile gradients before they are clipped, or a layer keeps
            statistics of the batch, so that no clipping bounds what one unit changes.
    """
    for module in model.modules():
        if isinstance(module, _WRAPPERS):
            raise UncoveredParameters(
                f"a {type(module).__name__} sums or compiles gradients before they are clipped; "
                "give the model itself, and for several processes train_steps' ranks"
            )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UncoveredParameters("the model has no trainable parameter; choose a tuner")
    for name, parameter in trainable.items():
        if isinstance(parameter, DTensor):
            raise UncoveredParameters(
                f"{name} is sharded; shard the frozen weights only: fully_shard(module, "
                "ignored_params={trainable parameters})"
            )
        if parameter.dtype != torch.float32:
            raise UncoveredParameters(
                f"{name} is {parameter.dtype}; trainable parameters must be float32, "
                "because a half-precision norm passes the clip"
            )
    for name, module in model.named_modules():
        # Only these two keep or use what other units brought into the batch.
        if isinstance(module, _BATCH_STATISTICS) and module.track_running_stats:
            raise UncoveredParameters(
                f"{name or 'the model'} is a {type(module).__name__}: it mixes the units of a "
                "batch and remembers them; replace it by GroupNorm or LayerNorm"
            )
    obstacles = (*_uncovered(model), *_shared(model), *_coupled(model))
    return Coverage(parameters=tuple(trainable), obstacles=obstacles)


def own_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that a module owns itself, by their names in it."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


def kind(module: nn.Module) -> str | None:
    """How the engine takes a module's gradients apart, or None where it cannot.

    ``linear`` (or GPT-2's transposed one), ``norm`` (torch's), ``scale`` (the norms of
    transformers: one elementwise weight) and ``bias`` (over a quantized linear). Types must match
    exactly: a subclass, a parametrized or an already patched layer may compute something else.
    """
    if "forward" in module.__dict__:
        return None
    cls = type(module)
    if cls in (nn.Linear, Conv1D):
        return "linear"
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return "norm"
    if cls.__name__.endswith("RMSNorm") and _is_scale(module):
        return "scale"
    if cls.__module__.startswith("bitsandbytes.") and set(own_trainable(module)) == {"bias"}:
        return "bias"
    return None


def _is_scale(module: nn.Module) -> bool:
    owned = dict(module.named_parameters(recurse=False))
    return set(owned) == {"weight"} and owned["weight"].dim() == 1


def _uncovered(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if own_trainable(module) and kind(module) is None:
            first = f"{name}.{next(iter(own_trainable(module)))}".lstrip(".")
            yield f"{first} belongs to a {type(module).__name__}"
        variant = getattr(module, "lora_variant", None)  # only PEFT's LoRA layers have it
        if isinstance(variant, dict | nn.ModuleDict) and len(variant) > 0:
            yield f"{name} is a LoRA variant that does not call its layers"


def _shared(model: nn.Module) -> Iterator[str]:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and owners.setdefault(id(parameter), name) != name:
                yield f"{name} and {owners[id(parameter)]} share a weight"


def _coupled(model: nn.Module) -> Iterator[str]:
    """Layers whose rows depend on which other rows are in the batch."""
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt) and float(module.state.threshold) > 0:
            # LLM.int8() takes a column out of the quantized product once any row is large in it.
            yield f"{name} looks for int8 outliers over the whole batch (llm_int8_threshold > 0)"
            return
    for name, module in model.named_modules():
        if "expert" in type(module).__name__.lower() or name.endswith(".experts"):
            yield f"{name} routes tokens to experts, so that its rows are not the batch's"
            return
