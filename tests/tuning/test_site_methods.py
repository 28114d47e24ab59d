"""Every method that sites train: one start everywhere, exact clips, closed keys; others refused."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedward.client.step_check import check_step
from fedward.errors import ConfigurationError, InvalidValue, ModelError, UncoveredParameters
from fedward.plan import Plan, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_tuner import LORA, METHODS, REFUSED, UNMERGEABLE
from fedward.privacy.coverage import coverage
from fedward.privacy.engine import UnitGradients
from fedward.privacy.noise import SecureStream
from fedward.privacy.probe import check_independence
from fedward.privacy.training import train_steps
from fedward.tuning import methods, tuners
from fedward.tuning.adapter import adapter_state, load_adapter
from fedward.tuning.models import load_base
from fedward.tuning.objectives import collate, encode, loss_per_example
from fedward.tuning.records import group
from fedward.tuning.tuners import attach, rates, trainable
from tests.privacy.tiny import (
    UNITS,
    clipped_sum,
    distance,
    mechanism,
    released,
    unit_gradients,
)
from tests.tuning.rig import LABELS, ROWS, make_plan

SFT = Task(max_length=32)
CLASSIFY = Task(objective="classify", labels=LABELS, max_length=32)
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{method: {"r": 2, "target_modules": ["q_proj", "v_proj"]} for method in LORA},
    "houlsby": {"r": 2},
    "pfeiffer": {"r": 2},
    "ia3": {},
    "vera": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
    "oft": {"oft_block_size": 8, "target_modules": ["q_proj"]},
    "bitfit": {"target_modules": ["q_proj"]},
    "prompt": {"num_virtual_tokens": 2},
    "prefix": {"num_virtual_tokens": 2},
    "p-tuning": {"num_virtual_tokens": 2, "encoder_hidden_size": 8},
}
VECTORS = ("prompt", "prefix", "p-tuning")
IDS = torch.tensor([[5, 6, 7, 8]])

each = pytest.mark.parametrize("method", METHODS)


def tuner(method: str, **changes: Any) -> Tuner:
    return Tuner(method=method, arguments=ARGUMENTS[method] | changes)


def plan_of(folder: Path, method: str, **sections: Any) -> Plan:
    return make_plan(folder, **{"tuner": tuner(method), "task": SFT} | sections)


def tuned(plan: Plan) -> PeftModel:
    return attach(load_base(plan.model, plan.task)[0], plan)


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def test_every_method_of_the_shared_table_is_trained_or_refused():
    assert {*METHODS} | {*REFUSED} == {*methods.METHODS}
    assert not {*METHODS} & {*REFUSED}
    assert {*ARGUMENTS} == {*METHODS}
    for method in METHODS:
        assert methods.METHODS[method].mergeable == (method not in UNMERGEABLE)


@pytest.mark.parametrize("method", REFUSED)
def test_what_sites_refuse_is_refused_by_the_plan_with_the_reason(method):
    with pytest.raises(InvalidValue, match=r"method = .*expected") as caught:
        Tuner(method=method)
    assert REFUSED[method] in str(caught.value)


@each
def test_the_start_is_the_plans_alone_and_computes_what_the_base_does(models, method):
    plan = plan_of(models["llama"], method)
    states = []
    for draw in (1, 2):
        torch.manual_seed(draw)
        model = tuned(plan)
        states.append(adapter_state(model))
        assert torch.initial_seed() == draw, "the caller's generator is left alone"
    one, other = states
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert set(trainable(model)) <= set(one)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    base = load_base(plan.model, plan.task)[0]
    with torch.no_grad():
        before, after = (m.train(False)(input_ids=IDS).logits[:, -4:] for m in (base, model))
    near = torch.allclose(before, after, atol=1e-5)
    assert near == (method not in VECTORS)


@pytest.mark.parametrize("method", [*VECTORS, "vera", "lora"])
def test_another_seed_is_another_start(models, method):
    one, other = (adapter_state(tuned(plan_of(models["llama"], method, seed=s))) for s in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@each
def test_a_step_is_exact_against_one_record_at_a_time(models, method):
    """The site's own loss and tuner, half of the units clipped, in batches of three and whole."""
    plan = plan_of(models["llama"], method)
    base, tokenizer = load_base(plan.model, plan.task)
    model = attach(base, plan)
    shake(model)
    unlike = [{"text": row["text"][2 * n :]} for n, row in enumerate(ROWS[:9])]
    encoded = encode(group(unlike, None), tokenizer, plan)

    def loss(wrapped: nn.Module, rows: Sequence[int]) -> Tensor:
        return loss_per_example(wrapped, collate(encoded, rows, "cpu"))

    gradients = unit_gradients(model, UNITS, loss)
    assert all(any(unit[name].any() for unit in gradients) for name in gradients[0])
    norms = [float(torch.cat([g.flatten() for g in unit.values()]).norm()) for unit in gradients]
    clip = sorted(norms)[2] * 0.999  # three of five are clipped
    expected = clipped_sum(gradients, clip)
    for physical_batch in (3, 32):
        found, facts = released(model, loss, mechanism(clip=clip), physical_batch=physical_batch)
        assert facts.clipped == 0.6
        assert distance(expected, found) < 2e-6
    assert distance(clipped_sum(gradients, 1.01 * clip), found) > 1e-4, "negative control"


def between_worlds(model: nn.Module, plan: Plan) -> tuple[float, float]:
    """How far one patient, in two steps, moves what comes of the very same noise; and the clip."""
    base_tokens = load_base(plan.model, plan.task)[1]
    encoded = encode(group(ROWS[:1], None), base_tokens, plan)
    step, start = mechanism(clip=1e-3, noise_multiplier=50.0), adapter_state(model)
    nobody: list[list[int]] = [[]]
    ends = []
    for units in (nobody, [[0]]):  # and one patient, who is drawn both times
        load_adapter(model, start)
        optimizer = torch.optim.SGD(list(trainable(model).values()), lr=1.0)
        train_steps(
            model,
            units,
            lambda wrapped, rows: loss_per_example(wrapped, collate(encoded, rows, "cpu")),
            optimizer,
            step,
            steps=2,
            stream=SecureStream(bytes(32)),
        )
        ends.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
    return float((ends[0] - ends[1]).norm()), step.clip


@each
def test_a_patient_moves_noise_by_no_more_than_the_clips(models, method):
    """Whatever leaves the site: also what forward passes, buffers and the optimizer do to it."""
    plan = plan_of(models["llama"], method)
    model = tuned(plan)
    shake(model)
    moved, clip = between_worlds(model, plan)
    assert 0.5 * clip < moved < 2.001 * clip


def test_a_forward_pass_that_moves_weights_is_refused(models, monkeypatch):
    """The control: OFT's ``coft`` projects them, wherever anybody was drawn."""
    plan = plan_of(models["llama"], "oft", tuner=tuner("oft", coft=True))
    with pytest.raises(ConfigurationError, match="unknown key 'coft'"):
        tuned(plan)
    base, _ = load_base(plan.model, plan.task)
    model: Any = get_peft_model(base, OFTConfig(**ARGUMENTS["oft"], coft=True, eps=1e-3))
    shake(model)
    with pytest.raises(UncoveredParameters, match="a forward pass moves"):
        between_worlds(model, plan)
    monkeypatch.setattr(UnitGradients, "_seen", lambda _: [])
    moved, clip = between_worlds(model, plan)
    assert moved > 100 * clip


@each
def test_schemes_that_need_a_product_of_two_factors(models, method):
    for scheme in ("ffa", "alternating", "sketch-once"):
        aggregation: Any = Aggregation(scheme=scheme)
        if method in LORA:
            plan_of(models["llama"], method, aggregation=aggregation)
            continue
        with pytest.raises(InvalidValue, match="no product of A and B"):
            plan_of(models["llama"], method, aggregation=aggregation)


class TestVera:
    def test_the_shared_projections_travel_with_the_adapter(self, models):
        model = tuned(plan_of(models["llama"], "vera"))
        state = adapter_state(model)
        shared = [name for name in state if ".vera_A." in name or ".vera_B." in name]
        assert len(shared) == 2
        assert not set(shared) & set(trainable(model)), "they are never summed"
        changed = {n: t + 1 if n in shared else t for n, t in state.items()}
        load_adapter(model, changed)
        assert all(torch.equal(t, changed[n]) for n, t in adapter_state(model).items())

    def test_every_layer_uses_what_was_loaded(self, models):
        model = tuned(plan_of(models["llama"], "vera"))
        shake(model)
        with torch.no_grad():
            before = model(input_ids=IDS).logits
            load_adapter(model, {n: -t for n, t in adapter_state(model).items()})
            # Four factors each with the other sign: b and d as well, so the update is the same.
            torch.testing.assert_close(model(input_ids=IDS).logits, before)
            flipped = {n: -t if ".vera_A." in n else t for n, t in adapter_state(model).items()}
            load_adapter(model, flipped)
            assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)


class TestLoraPlus:
    def test_b_moves_by_a_multiple_of_the_rate(self, models):
        plan = plan_of(models["llama"], "lora+", tuner=tuner("lora+", loraplus_lr_ratio=4))
        model = tuned(plan)
        names = {id(p): name for name, p in trainable(model).items()}
        found = {names[id(p)]: group["lr"] for group in rates(model, plan) for p in group["params"]}
        assert found.keys() == trainable(model).keys()
        for name, rate in found.items():
            assert rate == plan.rounds.learning_rate * (4 if ".lora_B." in name else 1)
        usual = {group["lr"] for group in rates(model, plan_of(models["llama"], "lora+"))}
        assert usual == {plan.rounds.learning_rate, plan.rounds.learning_rate * 16}

    def test_others_have_one_rate(self, models):
        plan = plan_of(models["llama"], "lora")
        assert [group["lr"] for group in rates(tuned(plan), plan)] == [plan.rounds.learning_rate]

    def test_a_pooled_step_has_one_rate(self, models):
        one = Rounds(
            count=1, steps=1, sampling_rate=0.5, normaliser=4.0, learning_rate=0.1, optimizer="sgd"
        )
        pooled: dict[str, Any] = {"mode": "pooled", "rounds": one, "cohort": Cohort(colluders=1)}
        plan_of(models["llama"], "lora", **pooled)
        with pytest.raises(InvalidValue, match=r"another than 'lora\+'"):
            plan_of(models["llama"], "lora+", **pooled)


class TestVectorsBeforeTheInput:
    @pytest.mark.parametrize("method", ["prompt", "p-tuning"])
    def test_a_decoder_would_classify_by_the_padding_behind_them(self, models, method):
        plan = plan_of(models["classifier"], method, task=CLASSIFY)
        with pytest.raises(ConfigurationError, match="needs an encoder"):
            tuned(plan)

    @pytest.mark.parametrize("method", VECTORS)
    def test_leave_the_longest_record_its_place(self, models, method, monkeypatch):
        """Else it would end the training, and that a site fails would tell of a patient."""
        fits, longer = (dataclasses.replace(CLASSIFY, max_length=n) for n in (126, 127))
        check_step(plan_of(models["bert"], method, task=fits))
        with pytest.raises(InvalidValue, match="at most 126"):
            tuned(plan_of(models["bert"], method, task=longer))
        monkeypatch.setattr(tuners, "_check_room", lambda *_: None)
        with pytest.raises(ModelError, match="does not take so many tokens"):
            check_step(plan_of(models["bert"], method, task=longer))

    @pytest.mark.parametrize(
        ("name", "method"), [("bert", "prompt"), ("bert", "p-tuning"), ("classifier", "prefix")]
    )
    def test_records_of_a_batch_stay_apart(self, models, name, method):
        plan = plan_of(models[name], method, task=CLASSIFY)
        base, tokenizer = load_base(plan.model, plan.task)
        model = attach(base, plan)
        shake(model)
        encoded = encode(group(ROWS[:6], None), tokenizer, plan)

        def loss(wrapped: nn.Module, rows: Sequence[int]) -> Tensor:
            return loss_per_example(wrapped, collate(encoded, rows, "cpu"))

        check_independence(model, loss, range(6))
        assert not coverage(model).single_pass


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("rslora", {"use_rslora": False}, "unknown key"),
        ("dora", {"use_dora": False}, "unknown key"),
        ("lora", {"loraplus_lr_ratio": 4}, "unknown key"),
        ("lora+", {"loraplus_lr_ratio": 1001}, "1 to 1000"),
        ("lora+", {"loraplus_lr_ratio": "4"}, "1 to 1000"),
        ("houlsby", {"use_dora": True}, "unknown key"),
        ("vera", {"projection_prng_key": 3}, "unknown key"),
        ("vera", {"vera_dropout": 0.1}, "0 under privacy"),
        ("vera", {"r": 5000}, "1 to 1024"),
        ("oft", {"module_dropout": 0.1}, "0 under privacy"),
        ("oft", {"oft_block_size": 0}, "1 to 65536"),
        ("prompt", {"num_virtual_tokens": 70000}, "1 to 65536"),
        ("prompt", {"tokenizer_name_or_path": "x"}, "unknown key"),
        ("prompt", {"prompt_tuning_init": "TEXT"}, "unknown key"),
        ("p-tuning", {"encoder_reparameterization_type": "LSTM"}, "unknown key"),
        ("p-tuning", {"encoder_hidden_size": 10**9}, "1 to 65536"),
        ("ia3", {"init_ia3_weights": False}, "unknown key"),
        ("bitfit", {"init_weights": False}, "unknown key"),
    ],
)
def test_a_key_that_a_site_does_not_take(models, method, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        tuned(plan_of(models["llama"], method, tuner=tuner(method, **arguments)))


def test_attaching_leaves_the_plan_as_it_is(models):
    for method in METHODS:
        chosen = tuner(method)
        before = copy.deepcopy(dict(chosen.arguments))
        tuned(plan_of(models["llama"], method, tuner=chosen))
        assert chosen.arguments == before
