"""The trainer gives one vector: the plan's own, private, and noise where the data are of no use."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedward.attempt import Attempt
from fedward.client import trainer as module
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.errors import DataError, ModelError
from fedward.plan import Metrics, Plan, Privacy
from fedward.privacy.accounting import epsilon
from fedward.privacy.planned import training_event
from fedward.tuning.objectives import loss_per_example
from fedward.tuning.records import Records, group
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import Vector
from tests.simulations import tiny


def update(plan: Plan, records: Records, *, site: str = "a", **changes: Any) -> Vector:
    trainer = LocalTrainer(records, key=tiny.key(site))
    return trainer.train(tiny.make_request(plan, **changes)).update


@pytest.fixture
def plan(base):
    return tiny.make_plan(base)


def broken_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose loss is not a number for any record."""
    monkeypatch.setattr(
        module, "loss_per_example", lambda *args: loss_per_example(*args) * math.nan
    )


def test_an_update_is_the_trainable_parameters_and_reproducible(plan):
    records = tiny.make_records("a", 4)
    one, again = update(plan, records), update(plan, records)
    assert one.dtype == np.float32
    assert one.shape == (sum(math.prod(shape) for _, shape in tuned_model(plan).layout),)
    assert np.array_equal(one, again)


@pytest.mark.parametrize("change", [{"site": "b"}, {"draw": 1}, {"number": 2}])
def test_another_key_draw_or_round_has_other_noise(plan, change):
    records = tiny.make_records("a", 4)
    assert not np.array_equal(update(plan, records), update(plan, records, **change))


def test_one_session_tried_again_before_anything_left_is_the_same_update(plan):
    """The reservation serves a retrained update: its noise must not be averaged away by retries."""
    records = tiny.make_records("a", 4)
    again = Attempt(run="r", round=1, attempt=2)
    assert np.array_equal(update(plan, records), update(plan, records, attempt=again))


def test_without_a_key_the_noise_is_the_operating_systems(plan):
    records = tiny.make_records("a", 4)
    one, other = (LocalTrainer(records).train(tiny.make_request(plan)).update for _ in range(2))
    assert not np.array_equal(one, other)


def test_the_noise_of_the_plan_is_the_smallest_that_keeps_to_it(plan):
    rounds, privacy = plan.rounds, plan.privacy
    sigma = mechanism(plan).noise_multiplier
    whole = training_event(plan).times(rounds.count + rounds.spare)
    less = dataclasses.replace(whole, noise_multiplier=sigma - 0.001)
    assert epsilon([whole], privacy.delta) <= privacy.epsilon < epsilon([less], privacy.delta)


def noise_of_one_step(base: Path, *, factor: float = 1.0) -> float:
    """Standard deviation of a step that sees nobody, over sigma x clip x rate / normaliser."""
    rounds = tiny.make_rounds(optimizer="sgd", learning_rate=1.0)
    plan = tiny.make_plan(base, rounds=rounds)
    private = mechanism(plan)
    noisier = dataclasses.replace(private, noise_multiplier=private.noise_multiplier * factor)
    moved = tiny.trained(plan, noisier, steps=1)
    return float(moved.std()) * rounds.normaliser / private.noise_multiplier / plan.privacy.clip


def test_the_noise_has_the_plans_scale(base):
    tolerance = 5 / math.sqrt(2 * 384)
    assert abs(noise_of_one_step(base) - 1) < tolerance
    for factor in (2 / 3, 3 / 2):
        assert abs(noise_of_one_step(base, factor=factor) - 1) > tolerance, "negative control"


def test_proximal_pulls_every_step_to_the_start_after_the_noise(base):
    """With mu = 1 / learning rate a step forgets all before it: what is left is its own noise."""
    rate = 0.5
    plan = tiny.make_plan(base, rounds=tiny.make_rounds(optimizer="sgd", learning_rate=rate))

    def noise(steps: int, mu: float) -> Vector:
        pull = module._stay_near(mu) if mu else None
        return tiny.trained(plan, mechanism(plan), steps=steps, before_step=pull)

    one, two, pulled = noise(1, 0.0), noise(2, 0.0), noise(2, 1 / rate)
    np.testing.assert_allclose(pulled, two - one, atol=1e-5)
    assert np.abs(pulled - two).max() > 0.01, "negative control"
    assert np.array_equal(noise(1, 1 / rate), one), "the first step is where it starts"


def moved(plan: Plan, **options: Any) -> Vector:
    """What two steps without noise, which everybody is drawn for, change."""
    step = dataclasses.replace(mechanism(plan), sampling_rate=1.0, noise_multiplier=0.0)
    return tiny.trained(plan, step, steps=2, records=tiny.make_records("a", 6), **options)


def test_memory_settings_change_passes_and_no_update(base, monkeypatch):
    rounds = tiny.make_rounds(optimizer="sgd", learning_rate=1.0)
    plain = tiny.make_plan(base, rounds=rounds)
    passes: list[int] = []

    def counted(*args: Any) -> Any:
        passes.append(len(args[1]["input_ids"]))
        return loss_per_example(*args)

    monkeypatch.setattr(module, "loss_per_example", counted)
    small = dataclasses.replace(plain, rounds=dataclasses.replace(rounds, physical_batch=1))
    model = dataclasses.replace(plain.model, gradient_checkpointing=True)
    whole = moved(plain)
    one_pass = max(passes)
    assert np.abs(whole).max() > 1e-3
    most = plain.privacy.records_per_unit
    for plan, options in (
        (small, {}),
        (plain, {"physical_batch": 1}),  # a site's own limit
        (dataclasses.replace(plain, model=model), {}),
    ):
        passes.clear()
        assert np.abs(moved(plan, **options) - whole).max() < 1e-6 * np.abs(whole).max()
        assert max(passes) == one_pass if plan.model == model else max(passes) <= most < one_pass


def test_checkpointing_is_really_on(base):
    plan = tiny.make_plan(base)
    model = dataclasses.replace(plan.model, gradient_checkpointing=True)
    for asked, of in ((False, plan), (True, dataclasses.replace(plan, model=model))):
        modules = tuned_model(of).model.modules()
        assert any(vars(m).get("gradient_checkpointing") for m in modules) == asked


def test_a_loss_that_is_no_number_gives_noise_and_the_same_answer(plan, monkeypatch):
    """Whether a patient breaks the loss is the patient's secret: the site answers all the same."""
    expected = update(plan, tiny.make_records("a", 4))
    broken_loss(monkeypatch)
    found = update(plan, tiny.make_records("a", 4))
    assert np.isfinite(found).all()
    assert found.shape == expected.shape
    assert found.std() > 0
    # Nothing of the records is in it: other records give the very same numbers.
    assert np.array_equal(found, update(plan, tiny.make_records("x", 4, notes=1)))


def test_without_privacy_a_loss_that_is_no_number_is_an_error(base, monkeypatch):
    broken_loss(monkeypatch)
    with pytest.raises(ModelError, match="gradient was finite"):
        update(tiny.make_plan(base, privacy=tiny.NAKED), tiny.make_records("a", 4))


def test_one_patient_that_breaks_the_loss_counts_as_zero(base, monkeypatch):
    plan = tiny.make_plan(base, privacy=tiny.NAKED)
    records = tiny.make_records("a", 4, notes=1)

    def third_breaks(model, batch):
        return loss_per_example(model, batch) * torch.tensor([1.0, 1.0, math.inf, 1.0])

    without = group([row for i, row in enumerate(records.rows) if i != 2], "patient")
    expected = update(plan, without)
    assert np.abs(update(plan, records) - expected).max() > 1e-6, "negative control"
    monkeypatch.setattr(module, "loss_per_example", third_breaks)
    assert np.abs(update(plan, records) - expected).max() < 1e-6


def test_parameters_that_overflow_are_an_error_that_the_noise_explains(base):
    rounds = tiny.make_rounds(learning_rate=3e38, optimizer="sgd", steps=9)
    with pytest.raises(ModelError, match="lower learning_rate"):
        update(tiny.make_plan(base, rounds=rounds), tiny.make_records("a", 2))


def test_a_site_without_records_answers_with_noise_and_says_so_at_home(base, caplog):
    """An error would tell whether its only patient is there; without privacy it is one."""
    found = update(tiny.make_plan(base), tiny.NOBODY)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0
    assert "its updates are noise alone" in caplog.text
    with pytest.raises(DataError, match="at least one patient"):
        update(tiny.make_plan(base, privacy=tiny.NAKED), tiny.NOBODY)


@pytest.mark.parametrize("odd", [{"label": "CANARY-liver"}, {"text": "CANARY \ud800"}])
def test_a_patient_whose_record_does_not_fit_counts_as_zero(base, caplog, odd):
    """An error would tell that the patient is there; who else is there learns nothing either.

    The second one is a library's: no tokenizer takes half a surrogate pair.
    """
    rows = tiny.make_rows("a", 4, notes=1)
    rows[2] |= odd
    plan = tiny.make_plan(base, privacy=tiny.NAKED)
    found = update(plan, group(rows, "patient"))
    without = group([row for place, row in enumerate(rows) if place != 2], "patient")
    assert np.abs(found - update(plan, without)).max() < 1e-6
    assert "its unit is left out" in caplog.text
    assert "CANARY" not in caplog.text


def test_another_layout_or_adapter_than_the_models_is_refused(plan):
    records = tiny.make_records("a", 3)
    with pytest.raises(ModelError, match="not those of this site's model"):
        update(plan, records, layout=tuned_model(plan).layout[:-1])
    with pytest.raises(ModelError):
        update(plan, records, adapter=b"not safetensors")


def test_the_sites_own_evaluation_needs_records_of_its_own(plan):
    records = tiny.make_records("a", 3)
    with pytest.raises(DataError, match="no held-out records"):
        LocalTrainer(records).evaluate(plan, tuned_model(plan).start, "r")
    trainer = LocalTrainer(records, held_out=tiny.make_records("b", 2))
    scores = trainer.evaluate(plan, tuned_model(plan).start, "r")
    assert 0 < scores.loss < 5
    assert scores.accuracy in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_the_sites_own_model_folder_takes_the_place_of_the_plans_path(plan, base):
    records = tiny.make_records("a", 4)
    elsewhere = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path="elsewhere"))
    asked = dataclasses.replace(tiny.make_request(plan), plan=elsewhere)
    with pytest.raises(ModelError, match="no such folder"):
        LocalTrainer(records).train(asked)
    steps: list[int] = []
    trainer = LocalTrainer(records, model=base, on_step=steps.append)
    assert np.isfinite(trainer.train(asked).update).all()
    assert steps == [1]


def test_metric_slots_come_with_the_update_where_the_plan_asks(base):
    records, held_out = tiny.make_records("a", 3), tiny.make_records("b", 5)
    naked = Privacy(epsilon=math.inf, delta=1e-5)
    for metrics, expected in ((None, 0), (Metrics(epsilon=1.0), 3)):
        plan = tiny.make_plan(base, privacy=naked, metrics=metrics)
        result = LocalTrainer(records, held_out=held_out).train(tiny.make_request(plan))
        assert result.slots.shape == (expected,)
    loss, correct, units = result.slots
    assert units == 5
    assert 0 <= correct <= 5
    assert 0 < loss < 5
