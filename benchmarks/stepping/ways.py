"""Six ways to take one step on the same model and records; five of them private.

Each makes a function without arguments that takes one whole step: forward, backward, clip, noise,
AdamW. Fedward's also draws its units and reads its noise from the AES stream; the others use
torch's generator, as Opacus does by default.
"""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn

from fedward.privacy.engine import UnitGradients
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism, UnitOptimizer
from fedward.privacy.training import draw, take_step
from stepping.models import Losses

CLIP, SIGMA = 1.0, 1.0
Step = Callable[[], None]
Way = Callable[[Any, Losses, int], Step]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)


def plain(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """Training without privacy."""
    optimizer = _adamw(model)

    def step() -> None:
        torch.autograd.backward(losses(model, range(batch)).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """Fedward's step. Rate 1 draws everybody, so that every way does the same work."""
    mechanism = Mechanism(
        sampling_rate=1.0,
        normaliser=float(batch),
        clip=CLIP,
        noise_multiplier=SIGMA,
        records_per_unit=1,
    )
    stream = SecureStream()
    engine = UnitGradients(model)
    private = UnitOptimizer(_adamw(model), mechanism=mechanism, stream=stream)
    units = [[record] for record in range(batch)]

    def step() -> None:
        take_step(engine, private, draw(units, mechanism, stream), losses, batch)

    return step


def _opacus(model: Any, losses: Losses, batch: int, **options: bool) -> Step:  # noqa: ANN401  # as above
    wrapped = GradSampleModule(model, **options)  # pyright: ignore[reportArgumentType]  # all bools
    optimizer = DPOptimizer(
        _adamw(model), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=batch
    )

    def step() -> None:
        torch.autograd.backward(losses(wrapped, range(batch)).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hooks(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """Opacus's default: backward hooks."""
    return _opacus(model, losses, batch)


def functorch(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """Opacus with ``torch.func`` in every layer."""
    return _opacus(model, losses, batch, force_functorch=True)


def ghost(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """Opacus's ghost clipping: norms first, then a second, reweighted backward."""
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP)  # pyright: ignore[reportArgumentType]
    optimizer = DPOptimizerFastGradientClipping(
        _adamw(model), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=batch
    )

    def step() -> None:
        loss = DPTensorFastGradientClipping(wrapped, optimizer, losses(wrapped, range(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loop(model: Any, losses: Losses, batch: int) -> Step:  # noqa: ANN401  # PEFT has no types
    """One record a backward pass, in plain torch."""
    optimizer = _adamw(model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        sums = [torch.randn_like(p) * (SIGMA * CLIP) for p in trained]
        for record in range(batch):
            torch.autograd.backward(losses(model, [record]).sum())
            grads = [p.grad for p in trained if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
            for held, grad in zip(sums, grads, strict=True):
                held.addcmul_(grad, factor)
            optimizer.zero_grad(set_to_none=True)
        for p, total in zip(trained, sums, strict=True):
            p.grad = total / batch
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


WAYS: dict[str, Way] = {
    "plain": plain,
    "ours": ours,
    "hooks": hooks,
    "functorch": functorch,
    "ghost": ghost,
    "loop": loop,
}
