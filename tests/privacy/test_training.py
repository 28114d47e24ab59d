import dataclasses
import math
from typing import Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit
from torch import Tensor, nn

from fedward.errors import InvalidValue, ModelError, UncoveredParameters
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism, UnitOptimizer, check_parameters
from fedward.privacy.training import draw, physical_batches, train_steps
from tests.privacy import tiny

KEY, UNITS, EVERYBODY = tiny.KEY, tiny.UNITS, tiny.EVERYBODY


def reference(model: Any, loss: Any, clip: float = 0.5, units: Any = UNITS) -> dict[str, Tensor]:
    return tiny.clipped_sum(tiny.unit_gradients(model, units, loss), clip)


def assert_exact(model: Any, tolerance: float = 3e-6) -> None:
    loss = tiny.losses(tiny.records(9))
    for physical_batch in (3, 32):
        found, facts = tiny.released(model, loss, physical_batch=physical_batch)
        assert facts.single_pass
        assert facts.clipped > 0.5, "a test where nothing is clipped proves nothing"
        expected = reference(model, loss)
        assert tiny.distance(expected, found) < tolerance
    # Negative control: a clip that is one per cent off is noticed.
    assert tiny.distance(reference(model, loss, clip=0.505), found) > 3 * tolerance


@pytest.mark.parametrize("how", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_lora_is_exact(family, how):
    assert_exact(tiny.checkpointed(tiny.lora(tiny.causal(family)), how))


@pytest.mark.parametrize("how", ["none", "reentrant", "non-reentrant"])
def test_qlora_is_exact(how):
    assert_exact(tiny.checkpointed(tiny.lora(tiny.quantized(tiny.causal("Llama"), "nf4")), how))


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_a_head_beside_lora_is_exact(base):
    model = tiny.classifier()
    model = model if base == "none" else tiny.quantized(model, base)
    assert_exact(tiny.lora(model, target_modules=["query", "value"], task_type="SEQ_CLS"))


def test_the_model_comes_back_as_it_was():
    model = tiny.lora(tiny.causal("Llama")).eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    optimizer = torch.optim.AdamW(list(tiny.trainable(model).values()))
    loss = tiny.losses(tiny.records(9))
    seen: list[int] = []
    noisy = dataclasses.replace(EVERYBODY, noise_multiplier=1.0)
    train_steps(
        model, UNITS, loss, optimizer, noisy, steps=3, stream=SecureStream(KEY), on_step=seen.append
    )
    assert seen == [1, 2, 3]
    assert not model.training
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not {"grad_sample", "summed_grad", "_forward_counter"} & set(vars(parameter))


def test_an_error_gives_the_model_back_too():
    model = tiny.lora(tiny.causal("Llama"))

    def broken(model, numbers):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.released(model, broken)
    optimizer = torch.optim.SGD(list(tiny.trainable(model).values()), lr=1.0)
    with pytest.raises(ZeroDivisionError):
        train_steps(model, UNITS, broken, optimizer, EVERYBODY, steps=1, stream=SecureStream(KEY))
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert_exact(model)


def test_an_empty_draw_moves_along_the_noise():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(9))
    rare = Mechanism(
        sampling_rate=1e-9, normaliser=4.0, clip=0.5, noise_multiplier=3.0, records_per_unit=1
    )
    nobody: list[list[list[int]]] = [UNITS, [], [[]]]
    for units in nobody:
        found, facts = tiny.released(model, loss, rare, units=units)
        assert (facts.units, facts.non_finite, facts.clipped) == (0, 0, 0.0)
        assert math.isnan(facts.loss)
        noise = torch.cat([x.flatten() for x in found.values()])
        assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 4.0, rel=0.05)
        # Negative control: what half the noise would show.
        assert float(noise.std()) / 2 != pytest.approx(3.0 * 0.5 / 4.0, rel=0.05)


def test_noise_is_added_to_the_very_sum():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(9))
    noisy = dataclasses.replace(EVERYBODY, noise_multiplier=2.0)
    quiet, _ = tiny.released(model, loss)
    found, _ = tiny.released(model, loss, noisy)
    noise = torch.cat([(found[n] - quiet[n]).flatten() for n in found]) / (2.0 * 0.5)
    stream = SecureStream(KEY)
    stream.uniform(len(UNITS))
    expected = torch.cat(
        [torch.from_numpy(stream.normal(p.numel())) for p in tiny.trainable(model).values()]
    )
    assert torch.allclose(noise.double(), expected, atol=1e-5)


def test_the_normaliser_divides_whatever_was_drawn():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(9))
    one, _ = tiny.released(model, loss)
    tenth, _ = tiny.released(model, loss, dataclasses.replace(EVERYBODY, normaliser=10.0))
    assert tiny.distance(one, {n: 10 * x for n, x in tenth.items()}) < 1e-5


def test_a_unit_with_an_infinite_loss_counts_as_zero():
    model = tiny.lora(tiny.causal("Llama"))
    ids = tiny.records(9)
    usual = tiny.losses(ids)

    def loss(model, numbers):
        bad = torch.tensor([math.inf if n == 4 else 1.0 for n in numbers])
        return usual(model, numbers) * bad

    for physical_batch in (3, 32):
        found, facts = tiny.released(model, loss, physical_batch=physical_batch)
        assert (facts.units, facts.non_finite) == (5, 1)
        assert math.isfinite(facts.loss)
        expected = reference(model, usual, units=[unit for unit in UNITS if 4 not in unit])
        assert tiny.distance(expected, found) < 3e-6
    # Negative control: its other records do not count either.
    expected = reference(model, usual, units=[*UNITS[:2], [3, 5], *UNITS[3:]])
    assert tiny.distance(expected, found) > 1e-3


def test_nothing_finite_at_all_releases_noise_alone_and_no_error():
    """An error would be an exact statement about the patients who were drawn."""

    def loss(model, numbers):
        return tiny.losses(tiny.records(9))(model, numbers) * math.nan

    _, facts = tiny.released(tiny.lora(tiny.causal("Llama")), loss)
    assert facts.units == facts.non_finite > 0
    assert math.isnan(facts.loss)


def test_no_more_records_than_allowed_and_each_once():
    stream = SecureStream(KEY)
    units = [list(range(100 * u, 100 * u + n)) for u, n in enumerate([0, 1, 2, 3, 50])]
    some = dataclasses.replace(EVERYBODY, records_per_unit=2)
    seen = set()
    for _ in range(200):
        drawn = draw(units, some, stream)
        assert [len(unit) for unit in drawn] == [1, 2, 2, 2]
        assert all(len(set(unit)) == len(unit) for unit in drawn)
        assert [unit[0] // 100 for unit in drawn] == [1, 2, 3, 4]
        seen.update(drawn[-1])
    assert seen == set(units[-1])


def test_units_are_drawn_independently_at_the_rate():
    rate, n, repeats = 0.3, 50, 2000
    half = dataclasses.replace(EVERYBODY, sampling_rate=rate)
    stream = SecureStream(KEY)
    sizes = torch.tensor([len(draw([[u] for u in range(n)], half, stream)) for _ in range(repeats)])
    sizes = sizes.double()

    def fits(rate: float) -> bool:
        return abs(float(sizes.mean()) - n * rate) < 4 * math.sqrt(n * rate * (1 - rate) / repeats)

    assert fits(rate)
    assert not fits(rate + 0.01)
    # Poisson sampling has a binomial's variance; drawing a fixed number would have none.
    assert float(sizes.var()) == pytest.approx(n * rate * (1 - rate), rel=0.15)


def test_physical_batches_keep_units_whole():
    drawn = [[0, 1], [2], [3, 4, 5], [6]]
    assert list(physical_batches(drawn, 3)) == [[[0, 1], [2]], [[3, 4, 5]], [[6]]]
    assert list(physical_batches(drawn, 100)) == [drawn]
    assert list(physical_batches(drawn, 1)) == [[unit] for unit in drawn]
    assert list(physical_batches([], 3)) == []


def test_a_physical_batch_too_small_for_one_unit_is_refused():
    with pytest.raises(InvalidValue, match="at least records_per_unit = 3"):
        tiny.released(tiny.lora(tiny.causal("Llama")), None, physical_batch=2)


def test_without_clip_and_noise_it_is_plain_training():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(9))
    plain = dataclasses.replace(EVERYBODY, clip=math.inf)
    found, facts = tiny.released(model, loss, plain)
    assert facts.clipped == 0.0
    assert tiny.distance(reference(model, loss, clip=math.inf), found) < 3e-6


def test_a_batch_mean_loss_is_refused():
    usual = tiny.losses(tiny.records(9))
    with pytest.raises(ModelError, match="one number a record"):
        tiny.released(
            tiny.lora(tiny.causal("Llama")), lambda model, numbers: usual(model, numbers).mean()
        )


def test_the_optimizer_must_hold_exactly_the_trainable_parameters():
    model = tiny.lora(tiny.causal("Llama"))
    loss = tiny.losses(tiny.records(9))
    some = list(tiny.trainable(model).values())
    for held in (some[1:], list(model.parameters())):
        with pytest.raises(UncoveredParameters, match="exactly the trainable parameters"):
            train_steps(
                model, UNITS, loss, torch.optim.SGD(held), EVERYBODY,
                steps=1, stream=SecureStream(KEY),
            )  # fmt: skip


def test_gradient_hooks_and_states_of_8_bits_are_refused():
    # A hook steps along, or looks at, gradients that nobody clipped: optimizers inside backward do.
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        model = tiny.lora(tiny.causal("Llama"))
        first = next(iter(tiny.trainable(model).values()))
        getattr(first, hook)(lambda _: None)
        with pytest.raises(UncoveredParameters, match="has a gradient hook"):
            check_parameters(model, torch.optim.SGD(tiny.trainable(model).values()))
    model = tiny.lora(tiny.causal("Llama"))
    with pytest.raises(UncoveredParameters, match="AdamW8bit keeps its states in 8 bits"):
        check_parameters(model, AdamW8bit(tiny.trainable(model).values()))  # type: ignore[no-untyped-call]  # bitsandbytes
    check_parameters(model, AdamW32bit(tiny.trainable(model).values()))  # type: ignore[no-untyped-call]  # as above


def test_noise_drawn_beside_the_backward_pass_is_the_same():
    released = []
    for aside in (False, True):
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 7))
        private = UnitOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            mechanism=tiny.mechanism(noise_multiplier=2.0), stream=SecureStream(KEY),
        )  # fmt: skip
        for _ in range(2):
            if aside:
                private.begin_noise()
            private.add_noise()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            released.append(torch.cat([grad.flatten() for grad in grads]))
        private.release()
    assert torch.equal(released[0], released[2])
    assert torch.equal(released[1], released[3])
    assert not torch.equal(released[0], released[1])


def test_without_noise_the_stream_is_left_alone():
    """Drawn in a thread that no step waits for, it would race with the draw of the next units."""
    for multiplier, untouched in ((0.0, True), (1.0, False)):
        model, stream = nn.Linear(40, 40), SecureStream(KEY)
        private = UnitOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            mechanism=tiny.mechanism(noise_multiplier=multiplier), stream=stream,
        )  # fmt: skip
        private.begin_noise()
        private.add_noise()
        private.release()
        assert (stream.words(1) == SecureStream(KEY).words(1)).all() == untouched


@pytest.mark.parametrize(
    "change",
    [{"clip": 0.0}, {"clip": math.nan}, {"normaliser": 0.0}, {"normaliser": math.inf},
     {"records_per_unit": 0}, {"sampling_rate": 0.0}, {"noise_multiplier": -1.0},
     {"clip": math.inf, "noise_multiplier": 1.0}],
)  # fmt: skip
def test_mechanisms_that_promise_nothing_are_refused(change):
    with pytest.raises(InvalidValue, match=f"^{next(iter(change))} = "):
        dataclasses.replace(EVERYBODY, **change)
