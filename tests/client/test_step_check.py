"""What cannot be trained privately is refused before a site reserves anything."""

import dataclasses
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F

from fedward.client.step_check import check_step
from fedward.client.trainer import LocalTrainer
from fedward.errors import ModelError
from fedward.plan import Data, Model, Task, Tuner
from fedward.tuning.models import fingerprint
from fedward.tuning.objectives import preference_loss, scores
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny


@pytest.fixture
def fresh():
    """No check and no model of another test."""
    for cache in (check_step, tuned_model):
        cache.cache_clear()
    yield
    for cache in (check_step, tuned_model):
        cache.cache_clear()


@pytest.mark.parametrize("hidden", [False, True], ids=["in the loss", "in gradients alone"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_a_reference_point_that_is_a_mean_over_the_batch_is_found(
    base, fresh, monkeypatch, beta, hidden
):
    """As in TRL's kto; wherever it is hidden, and however hard the reference holds."""

    def coupled(model: Any, batch: Any) -> torch.Tensor:
        found = scores(model, batch)
        mean = (found - batch["reference"]).mean()
        shifted = found - (mean - mean.detach() if hidden else mean.detach())
        return preference_loss(shifted, batch)

    data = Data(unit="patient", prompt="text", completion="answer", label="good")
    task = Task(objective="kto", beta=beta, max_length=16)
    plan = tiny.make_plan(base, task=task, data=data)
    check_step(plan)
    check_step.cache_clear()
    monkeypatch.setattr("fedward.client.step_check.loss_per_example", coupled)
    with pytest.raises(ModelError, match="cannot be trained privately"):
        check_step(plan)


@pytest.mark.parametrize("objective", ["classify", "sft"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_ordinary_plans_pass_in_one_pass(base, objective, quantize):
    model = Model(path=str(base), sha256=fingerprint(base), quantize=quantize)
    labels = tiny.LABELS if objective == "classify" else ()
    task = Task(objective=objective, labels=labels, max_length=16)
    assert check_step(tiny.make_plan(base, model=model, task=task)).single_pass


def test_the_slow_way_is_said_when_the_run_is_planned(base, caplog):
    arguments = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    assert not check_step(tiny.make_plan(base, tuner=Tuner(arguments=arguments))).single_pass
    assert "one backward pass a unit, slower, because" in caplog.text


def fused(layer: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """LoRA as fused kernels compute it: straight from the weights."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y: torch.Tensor = layer.base_layer(x)
    added: torch.Tensor = F.linear(F.linear(x, a), b) * layer.scaling["default"]
    return y + added


def test_fused_kernels_are_refused_before_anything_is_reserved(base, fresh, monkeypatch):
    plan = dataclasses.replace(tiny.make_plan(base), name="fused")
    asked = tiny.make_request(plan)
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", fused)
    trainer = LocalTrainer(tiny.make_records("a", 4), key=tiny.key("a"))
    with pytest.raises(ModelError, match=r"cannot be trained privately: .* fused kernel"):
        trainer.prepare(asked)


def test_a_loss_over_the_tokens_of_the_batch_is_refused(base, fresh, monkeypatch):
    def coupled(model: Any, batch: Any) -> torch.Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        tokens = batch["attention_mask"].sum(1)
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        coupled: torch.Tensor = losses * tokens / tokens.sum()
        return coupled

    monkeypatch.setattr("fedward.client.step_check.loss_per_example", coupled)
    with pytest.raises(ModelError, match="its own token count"):
        check_step(tiny.make_plan(base))
