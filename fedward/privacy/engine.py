"""Per-example gradients of many examples from one ordinary backward pass.

Each covered layer's ``forward`` is replaced, on the instance, by a closure around an autograd
function that computes the same output. Its backward writes ``grad_sample`` where the ordinary
backward would write ``grad``: the batched product replaces the summed one at the same cost, so that
private training costs what plain training does. No hook and no saved activation is added, which
keeps both kinds of gradient checkpointing exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedward.errors import ModelError, UncoveredParameters
from fedward.privacy.coverage import coverage, kind, own_trainable

Sink = Callable[..., None]
Forward = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """``F.linear`` whose backward hands input and output gradient to a sink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:  # noqa: ANN401  # autograd's own context
        """Compute ``x @ weight.T + bias``."""
        ctx.save_for_backward(x, weight)
        ctx.sink = sink
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:  # noqa: ANN401  # autograd's own context
        """Feed the sink; parameters get no gradient of their own."""
        x, weight = ctx.saved_tensors
        (grad,) = grads
        ctx.sink(x.detach(), grad.detach())
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        # The casts serve autocast, where the output is narrower than the input.
        weight = weight.to(grad.dtype)
        if weight.shape[1] < weight.shape[0]:  # as in _products: MKL is twice as fast this way
            return F.linear(grad, weight.t().contiguous()).to(x.dtype), None, None, None
        return (grad @ weight).to(x.dtype), None, None, None


class _Spread(torch.autograd.Function):
    """A parameter repeated for every row, whose backward keeps the rows' gradients apart."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rows: int, dims: int, sink: Sink) -> Tensor:  # noqa: ANN401  # autograd's own context
        """Shape ``(rows, 1, ..., *parameter.shape)`` with ``dims`` dimensions."""
        ctx.sink = sink
        ones = [1] * (dims - 1 - parameter.dim())
        return parameter.expand(rows, *ones, *parameter.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:  # noqa: ANN401  # autograd's own context
        """Feed the sink; the parameter gets no gradient of its own."""
        ctx.sink(grads[0].detach())
        return None, None, None, None


class UnitParameter(nn.Parameter):
    """A parameter with what Opacus hangs on it; for type checkers only.

    Attributes:
        grad_sample: Gradients of rows, shape ``(rows, *shape)``.
        summed_grad: Sum of clipped gradients so far, shape ``shape``.
    """

    grad_sample: Tensor | None
    summed_grad: Tensor | None


def _add(parameter: Tensor, rows: Tensor) -> None:
    """Add per-row gradients, shape ``(rows, *parameter.shape)``; a layer may be used twice."""
    rows = rows.float().reshape(len(rows), *parameter.shape)
    parameter = cast("UnitParameter", parameter)
    held = parameter.grad_sample
    parameter.grad_sample = rows if held is None else held + rows


def _spread(parameter: nn.Parameter | None, x: Tensor) -> Tensor | None:
    """The parameter repeated for every row of ``x``; as it is if it is frozen."""
    if parameter is None or not parameter.requires_grad:
        return parameter
    sink = partial(_add, parameter)
    spread: Tensor = _Spread.apply(parameter, len(x), x.dim(), sink)  # type: ignore[no-untyped-call]  # torch
    return spread


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Outer products summed over time, shape ``(rows, m, n)``, of ``(rows, time, m)`` and ``n``.

    With LoRA one of m and n is small. MKL multiplies few rows by many columns three times as fast
    as the reverse.
    """
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right)
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).contiguous()


def _linear(module: nn.Linear | Conv1D) -> Forward:
    transposed = isinstance(module, Conv1D)

    # The module is asked for its weight each time: FSDP puts a whole one there for the pass.
    def sink(x: Tensor, grad: Tensor) -> None:
        x, grad = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, grad))
        if module.weight.requires_grad:
            left, right = (x.to(grad.dtype), grad) if transposed else (grad, x.to(grad.dtype))
            _add(module.weight, _products(left, right))
        bias: nn.Parameter | None = module.bias
        if bias is not None and bias.requires_grad:
            _add(bias, grad.sum(1))

    def forward(x: Tensor) -> Tensor:
        matrix = module.weight.t() if transposed else module.weight
        y: Tensor = _Linear.apply(x, matrix, module.bias, sink)  # type: ignore[no-untyped-call]  # torch
        return y

    return forward


def _norm(module: nn.LayerNorm | nn.RMSNorm) -> Forward:
    shape = list(module.normalized_shape)
    bias = module.bias if isinstance(module, nn.LayerNorm) else None

    def forward(x: Tensor) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x, shape, eps=module.eps)
        else:
            y = F.rms_norm(x, shape, eps=module.eps)
        if (scale := _spread(module.weight, x)) is not None:
            y = y * scale
        if (shift := _spread(bias, x)) is not None:
            y = y + shift
        return y

    return forward


def _scale(module: nn.Module, plain: Forward) -> Forward:
    """A norm of transformers: whatever it computes, its weight multiplies elementwise."""
    weight = module._parameters["weight"]

    def forward(x: Tensor) -> Tensor:
        with _standing_in(module, "weight", _spread(weight, x)):
            return plain(x)

    return forward


def _bias(module: nn.Module, plain: Forward) -> Forward:
    """A quantized linear layer of which only the bias is trained."""
    bias = module._parameters["bias"]

    def forward(x: Tensor) -> Tensor:
        with _standing_in(module, "bias", None):
            y = plain(x)
        shift = _spread(bias, y)
        return y if shift is None else y + shift.to(y.dtype)

    return forward


@contextmanager
def _standing_in(module: nn.Module, name: str, value: Tensor | None) -> Iterator[None]:
    parameter = module._parameters[name]
    module._parameters[name] = value  # type: ignore[assignment]  # a tensor in a parameter's place
    try:
        yield
    finally:
        module._parameters[name] = parameter


def _private(module: nn.Module) -> Forward:
    """The forward that takes a covered module's gradients apart."""
    how = kind(module)
    if how == "scale":
        return _scale(module, module.forward)
    if how == "bias":
        return _bias(module, module.forward)
    if how == "linear" and isinstance(module, nn.Linear | Conv1D):
        return _linear(module)
    if how == "norm" and isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _norm(module)
    raise UncoveredParameters(f"a {type(module).__name__} is not covered")


class UnitGradients(AbstractGradSampleModule):  # type: ignore[misc]  # opacus has no types
    """A model whose backward pass leaves one gradient a row (or a unit) in ``grad_sample``.

    Call :meth:`begin`, then the model and ``backward`` of a sum over rows, then :meth:`collect`.
    Layers stay patched until :meth:`to_standard_module` gives the model back as it came.

    Args:
        model: In train mode, trainable parameters in float32.

    Attributes:
        coverage: How the gradients come about; see :class:`~fedward.privacy.coverage.Coverage`.
        single_pass: Whether ``grad_sample`` has a row for each example; else it has one row, the
            gradient of the whole pass, which must then serve one unit only.

    Raises:
        UncoveredParameters: No clipping could bound what one unit changes.

    Guarantees:
        After :meth:`collect`, row i of every ``grad_sample`` is the gradient of row i's loss and of
        nothing else, equal to that of the row alone up to rounding; or an error was raised.
    """

    def __init__(self, model: nn.Module) -> None:
        covered = coverage(model)  # before anything of the model is touched
        super().__init__(model, batch_first=True, loss_reduction="sum")
        self.coverage = covered
        self.single_pass = covered.single_pass
        self._rows = 0
        self._versions = list[int]()
        self._patched: list[nn.Module] = []
        self._trainable = [
            (name, cast("UnitParameter", parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        if self.single_pass:
            for module in model.modules():
                if own_trainable(module):
                    module.__dict__["forward"] = self._closure(module)
                    self._patched.append(module)

    @property
    def model(self) -> nn.Module:
        """The model itself, which keeps its own methods, unlike this wrapper."""
        model: nn.Module = self._module
        return model

    @property
    def device(self) -> torch.device:
        """Where the first trainable parameter is."""
        return self._trainable[0][1].device

    def begin(self, rows: int) -> None:
        """Announce a forward pass over ``rows`` examples.

        Raises:
            UncoveredParameters: Gradients of an earlier pass are still there; adding those of other
                examples to them would double what one unit can change.
        """
        for name, parameter in self._trainable:
            if parameter.grad_sample is not None or parameter.grad is not None:
                raise UncoveredParameters(
                    f"{name} still holds gradients of an earlier pass; clip them, or zero_grad()"
                )
        self._rows, self._versions = rows, self._seen()

    def _seen(self) -> list[int]:
        return [parameter._version for _, parameter in self._trainable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the wrapped model's
        """Announce the rows of the first tensor found in the arguments, and call the model."""
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self.begin(len(inputs[0]))
        return self._module(*args, **kwargs)

    def collect(self) -> None:
        """Check what the backward pass left, and bring it into ``grad_sample``.

        Raises:
            UncoveredParameters: A gradient went past the covered layers (a fused kernel, a weight
                used by itself), rows are missing, or the pass itself moved a parameter.
            ModelError: The loss depends on no trainable parameter.
        """
        if self._seen() != self._versions:
            raise UncoveredParameters(
                "a forward pass moves a trainable parameter: without noise, and only in a step "
                "that has drawn somebody"
            )
        for name, parameter in self._trainable:
            if parameter.grad is None:
                continue
            if self.single_pass:
                raise UncoveredParameters(
                    f"{name} got a gradient outside of its layer (a fused kernel, or a weight used "
                    "by itself): nobody would clip it"
                )
            parameter.grad_sample = parameter.grad.float().unsqueeze(0)
            parameter.grad = None
        found = {len(rows): name for name, rows in self.rows()}
        expected = self._rows if self.single_pass else 1
        if not found:
            raise ModelError("the loss depends on no trainable parameter; is the tuner active?")
        if set(found) != {expected}:
            raise UncoveredParameters(f"expected gradients of {expected} rows, got {found}")

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients that were collected, by parameter: shape ``(rows, *shape)``."""
        for name, parameter in self._trainable:
            if parameter.grad_sample is not None:
                yield name, parameter.grad_sample

    def drop(self) -> None:
        """Forget the gradients that were collected."""
        for _, parameter in self._trainable:
            parameter.grad_sample = None

    def remove_hooks(self) -> None:
        """Give every layer its own ``forward`` back."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched.clear()

    def _check_rows(self, x: Tensor, module: nn.Module) -> None:
        if x.dim() < 2 or len(x) != self._rows:
            raise UncoveredParameters(
                f"a {type(module).__name__} was called with shape {tuple(x.shape)}; the first "
                f"dimension must be the batch's {self._rows} rows"
            )

    def _closure(self, module: nn.Module) -> Forward:
        plain, private = module.forward, _private(module)

        def forward(x: Tensor) -> Tensor:
            # Without gradients this is evaluation, or reentrant checkpointing's first pass.
            if not torch.is_grad_enabled():
                y: Tensor = plain(x)
                return y
            self._check_rows(x, module)
            return private(x)

        return forward
