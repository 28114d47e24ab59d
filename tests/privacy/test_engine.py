import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedward.errors import ModelError, UncoveredParameters
from fedward.privacy.engine import UnitGradients
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import UnitOptimizer
from tests.privacy import tiny


def backward(losses: Tensor) -> None:
    torch.autograd.backward(losses.sum())


def test_rows_are_the_gradients_of_single_records():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(4))
    single = tiny.unit_gradients(model, [[0], [1], [2], [3]], loss)
    engine = UnitGradients(model)
    engine.begin(4)
    backward(loss(model, range(4)))
    engine.collect()
    for name, rows in engine.rows():
        for row, expected in zip(rows, single, strict=True):
            assert torch.allclose(row, expected[name], atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def test_it_runs_as_an_opacus_module_with_opacus_steps():
    # The way of Opacus's own loop: forward, backward, step, physical batches by skip signals.
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(6))
    expected = tiny.clipped_sum(tiny.unit_gradients(model, [[n] for n in range(6)], loss), 0.5)
    engine = UnitGradients(copy.deepcopy(model))
    optimizer = UnitOptimizer(
        torch.optim.SGD(list(tiny.trainable(engine.model).values()), lr=1.0),
        mechanism=tiny.EVERYBODY, stream=SecureStream(tiny.KEY),
    )  # fmt: skip
    kept: dict[str, Tensor] = {}
    optimizer.attach_step_hook(
        lambda _: kept.update({n: _grad(p) for n, p in tiny.trainable(engine.model).items()})
    )
    for rows, last in (([0, 1, 2, 3], False), ([4, 5], True)):
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.zero_grad()

        backward(loss(engine, rows))
        engine.collect()
        optimizer.step()
    assert tiny.distance(expected, kept) < 1e-6
    assert engine.to_standard_module() is engine.model


def test_evaluation_between_steps_is_untouched():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(4))
    plain = loss(model, range(4))
    engine = UnitGradients(model)
    with torch.no_grad():
        assert torch.equal(loss(model, range(4)), plain)
    engine.to_standard_module()
    assert torch.equal(loss(model, range(4)), plain)


def test_a_layer_used_twice_adds_up():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.layer(torch.tanh(self.norm(self.layer(x)))))

    torch.manual_seed(0)
    model, data = Twice(), torch.randn(5, 3, 4)

    def loss(model: Any, rows: Any) -> Tensor:
        losses: Tensor = model(data[list(rows)]).pow(2).mean((1, 2)) * torch.tensor(list(rows))
        return losses

    single = tiny.unit_gradients(model, [[n] for n in range(5)], loss)
    engine = UnitGradients(model)
    engine.begin(5)
    backward(loss(model, range(5)))
    engine.collect()
    for name, rows in engine.rows():
        assert torch.allclose(rows, torch.stack([s[name] for s in single]), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
@pytest.mark.parametrize("layer", [nn.Linear, nn.LayerNorm, nn.RMSNorm])
def test_any_number_of_middle_dimensions(layer, shape):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), layer(4, 4) if layer is nn.Linear else layer(4)
    )
    data = torch.randn(shape)

    def loss(model: Any, rows: Any) -> Tensor:
        losses: Tensor = model(data[list(rows)]).pow(3).flatten(1).sum(1)
        return losses

    single = tiny.unit_gradients(model, [[n] for n in range(5)], loss)
    engine = UnitGradients(model)
    engine.begin(5)
    backward(loss(model, range(5)))
    engine.collect()
    for name, rows in engine.rows():
        assert torch.allclose(rows, torch.stack([s[name] for s in single]), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_rows_and_sums_in_float32():
    model = tiny.lora(tiny.causal("Llama"))
    plain = tiny.losses(tiny.records(4))

    def loss(model: Any, rows: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, rows).float()

    single = tiny.unit_gradients(model, [[0], [1], [2], [3]], loss)
    engine = UnitGradients(model)
    engine.begin(4)
    backward(loss(model, range(4)))
    engine.collect()
    for name, rows in engine.rows():
        assert rows.dtype == torch.float32
        expected = torch.stack([s[name] for s in single])
        assert float((rows - expected).norm() / expected.norm()) < 0.02  # bfloat16 has 8 bits


def test_gradients_that_nobody_clipped_are_noticed():
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) + F.linear(x, self.layer.weight)  # as a fused kernel does

    model = Bypass()
    engine = UnitGradients(model)
    engine.begin(3)
    backward(model(torch.randn(3, 4)))
    with pytest.raises(UncoveredParameters, match=r"layer\.weight got a gradient outside"):
        engine.collect()


def test_two_passes_without_clipping_between_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    engine = UnitGradients(model)
    backward(engine(torch.randn(3, 4)))
    engine.collect()
    with pytest.raises(UncoveredParameters, match="still holds gradients of an earlier pass"):
        engine(torch.randn(3, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (12, 4)])
def test_inputs_whose_rows_are_not_the_batch_are_refused(shape):
    model = nn.Sequential(nn.Linear(4, 4))
    engine = UnitGradients(model)
    engine.begin(3)
    with pytest.raises(UncoveredParameters, match="must be the batch's 3 rows"):
        model(torch.randn(shape))


def test_a_loss_that_depends_on_nothing_trainable_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    engine = UnitGradients(model)
    engine.begin(3)
    backward(torch.ones(3, requires_grad=True))
    with pytest.raises(ModelError, match="depends on no trainable parameter"):
        engine.collect()


def test_rows_and_units_must_agree():
    model = nn.Sequential(nn.Linear(4, 4))
    engine = UnitGradients(model)
    optimizer = UnitOptimizer(
        torch.optim.SGD(model.parameters()), mechanism=tiny.EVERYBODY,
        stream=SecureStream(tiny.KEY),
    )  # fmt: skip
    backward(engine(torch.randn(3, 4)))
    with pytest.raises(UncoveredParameters, match="the units of 3 rows, got 2"):
        optimizer.clip_and_accumulate([0, 1])


def test_clipping_is_never_above_the_bound_and_leaves_short_ones_alone():
    model = nn.Sequential(nn.Linear(50, 50, bias=False))
    UnitGradients(model)
    optimizer = UnitOptimizer(
        torch.optim.SGD(model.parameters()), mechanism=tiny.EVERYBODY,
        stream=SecureStream(tiny.KEY),
    )  # fmt: skip
    (parameter,) = optimizer._units
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(1, 2500)).view(1, 50, 50)
    for norm in (0.0, 1e-30, 1e-3, 0.4999, 0.5001, 1.0, 1e15, 1e30, math.inf, math.nan):
        rows = direction * norm
        parameter.grad_sample, parameter.summed_grad = rows.clone(), None
        optimizer.clip_and_accumulate()
        summed = vars(parameter)["summed_grad"]
        assert float(summed.double().norm()) <= 0.5 * (1 + 1e-6)
        if norm < 0.5:
            assert torch.equal(summed, rows[0])
    # 1e-30 and 1e30 have squares that float32 does not hold: the norms are float64.
    assert (optimizer.units, optimizer.non_finite, optimizer.clipped) == (10, 2, 4)
