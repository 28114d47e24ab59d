"""How far one unit can move the sum before noise, searched over neighbours; and planted bugs.

The search must stay at the clip for the right engine, and pass it for every bug that is planted
here through a subclass or a wrong loss: a search that finds nothing proves nothing otherwise.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedward.privacy import training
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism, UnitOptimizer
from tests.privacy import tiny

FEATURES, CLASSES = 6, 3


class Micro(nn.Module):
    """A LoRA of rank 2 over a frozen linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.a, self.b = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, CLASSES, bias=False)
        nn.init.normal_(self.b.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(rows, classes)``."""
        logits: Tensor = self.base(x) + self.b(self.a(x))
        return logits


def losses(data: Tensor) -> Any:
    def loss(model: Any, rows: Any) -> Tensor:
        rows = list(rows)
        labels = torch.tensor(rows) % CLASSES
        return nn.functional.cross_entropy(model(data[rows]), labels, reduction="none")

    return loss


def worlds() -> Iterator[tuple[Tensor, list[list[int]], list[list[int]], float]]:
    """Data, units, the same without the canary unit, and a clip. Record 0 is in no unit."""
    for clip, others, scale, notes in itertools.product(
        (0.05, 10.0), (0, 1, 4), (0.05, 20.0), (1, 3)
    ):
        generator = torch.Generator().manual_seed(7)
        data = torch.randn(1 + others + notes, FEATURES, generator=generator)
        data[1 + others :] *= scale
        base = [[1 + n] for n in range(others)]
        yield data, [*base, list(range(1 + others, len(data)))], base, clip


def sensitivity(loss_of: Any = losses, **constants: Any) -> float:
    """The largest change of the released sum by one unit, in clips."""
    worst = 0.0
    for data, units, without, clip in worlds():
        given = {"sampling_rate": 1.0, "normaliser": 1.0, "records_per_unit": 3}
        mechanism = Mechanism(clip=clip, noise_multiplier=0.0, **given | constants)
        with_it, _ = tiny.released(Micro(), loss_of(data), mechanism, units)
        without_it, _ = tiny.released(Micro(), loss_of(data), mechanism, without)
        moved = sum(float((with_it[n] - without_it[n]).pow(2).sum()) for n in with_it) ** 0.5
        worst = max(worst, moved / clip)
    return worst


def test_one_unit_moves_the_sum_by_the_clip_and_no_more():
    assert 0.999 < sensitivity() < 1.0001


def planted(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> None:
    """Trains with an optimizer that has these wrong methods."""
    monkeypatch.setattr(training, "UnitOptimizer", type("Wrong", (UnitOptimizer,), methods))


def test_a_loss_over_the_batch_is_caught():
    def batch_mean(data: Tensor) -> Any:
        def loss(model: Any, rows: Any) -> Tensor:
            weights = data[list(rows)].norm(dim=1)  # as token counts
            result: Tensor = losses(data)(model, rows) * weights / weights.sum() * len(rows)
            return result

        return loss

    assert sensitivity(batch_mean) > 1.1


def test_records_clipped_one_by_one_are_caught(monkeypatch):
    def by_record(self: Any, groups: Any = None) -> None:
        UnitOptimizer.clip_and_accumulate(self, None)

    planted(monkeypatch, clip_and_accumulate=by_record)
    assert sensitivity() > 1.5


def test_a_clip_of_the_whole_batch_is_caught(monkeypatch):
    def whole(self: Any, groups: list[int] | None = None) -> None:
        UnitOptimizer.clip_and_accumulate(self, [0] * len(groups or []))

    planted(monkeypatch, clip_and_accumulate=whole)
    assert sensitivity() > 1.1


def test_a_parameter_that_is_not_clipped_is_caught(monkeypatch):
    def forgets(self: Any, groups: Any = None) -> None:
        first = self._units[0]
        kept = first.grad_sample
        first.grad_sample = None
        UnitOptimizer.clip_and_accumulate(self, groups)
        if kept is not None:
            first.summed_grad = kept.sum(0)

    planted(monkeypatch, clip_and_accumulate=forgets)
    assert sensitivity() > 5


def test_clipping_each_parameter_by_itself_is_caught(monkeypatch):
    def each(self: Any, groups: Any = None) -> None:
        kept = [(p, p.grad_sample) for p in self._units]
        for parameter, rows in kept:
            for other, _ in kept:
                other.grad_sample = rows if other is parameter else None
            UnitOptimizer.clip_and_accumulate(self, groups)

    planted(monkeypatch, clip_and_accumulate=each)
    assert 1.3 < sensitivity() < 1.42  # the square root of two parameters


def test_dividing_by_what_was_drawn_is_caught(monkeypatch):
    def actual(self: Any) -> None:
        for parameter in self._units:
            parameter.grad /= max(1, self.units) / 4

    planted(monkeypatch, scale_grad=actual)
    assert sensitivity() > 1.5


def test_another_unit_in_place_of_an_empty_draw_is_caught(monkeypatch):
    draw = training.draw

    def never_empty(units: Any, *rest: Any) -> Any:
        return draw(units, *rest) or [[0]]

    monkeypatch.setattr(training, "draw", never_empty)
    assert sensitivity() > 1.2


def test_a_step_left_out_is_caught(monkeypatch):
    def skips(self: Any, closure: Any = None) -> Any:
        return UnitOptimizer.step(self, closure) if self.units else None

    assert tiny.released(Micro(), None, units=[])[0]
    planted(monkeypatch, step=skips)
    assert not tiny.released(Micro(), None, units=[])[0]  # nothing was released: infinite


@pytest.mark.parametrize("wrong", [0.5, 1 / 4**0.5, 2.0])
def test_a_wrong_noise_scale_is_caught(monkeypatch, wrong):
    def deviation() -> float:
        mechanism = Mechanism(
            sampling_rate=1e-9, normaliser=1.0, clip=0.5, noise_multiplier=4.0, records_per_unit=1
        )
        found, _ = tiny.released(nn.Linear(100, 100), None, mechanism, [])
        return float(torch.cat([x.flatten() for x in found.values()]).std())

    assert deviation() == pytest.approx(2.0, rel=0.03)
    add_noise = UnitOptimizer.add_noise

    def off(self: Any) -> None:
        self.noise_multiplier *= wrong
        add_noise(self)

    planted(monkeypatch, add_noise=off)
    assert deviation() != pytest.approx(2.0, rel=0.03)


def test_noise_never_repeats(monkeypatch):
    mechanism = Mechanism(
        sampling_rate=1e-9, normaliser=1.0, clip=1.0, noise_multiplier=1.0, records_per_unit=1
    )

    def twice() -> list[Tensor]:
        model = nn.Linear(4, 4)
        kept: list[Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: kept.append(_grad(model.weight)))
        stream = SecureStream()
        for _ in range(2):
            training.train_steps(model, [], _no_loss, optimizer, mechanism, steps=2, stream=stream)
        return kept

    assert len({tuple(x.flatten().tolist()) for x in (*twice(), *twice())}) == 8

    def fixed(self: Any) -> None:
        self._stream = SecureStream(tiny.KEY)
        UnitOptimizer.add_noise(self)

    planted(monkeypatch, add_noise=fixed)
    assert len({tuple(x.flatten().tolist()) for x in twice()}) == 1


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def _no_loss(model: Any, rows: Any) -> Tensor:
    raise AssertionError("nobody was to be drawn")
