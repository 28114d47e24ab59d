"""Mixtures of experts: the experts or the routers alone, whole or by LoRA."""

from typing import Any

import pytest
import torch

from fedward.errors import ConfigurationError, ModelError
from fedward.plan import Model, Task
from fedward.server.central.job import Tuner
from fedward.server.central.loading import open_trained, starting_folder
from fedward.server.central.stages import build
from fedward.tuning.experts import part_of
from fedward.tuning.methods import METHODS
from fedward.tuning.models import load_base
from tests.server.central.rig import build_base, build_experts, make_step, run

PARTS = [name for name, method in METHODS.items() if method.part is not None]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module", params=["mixtral", "qwen3"])
def base(request, tmp_path_factory):
    return build_experts(tmp_path_factory.mktemp("base") / "model", kind=request.param, layers=2)


def weights(folder: Any) -> dict[str, torch.Tensor]:
    model, _, _ = open_trained(folder)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_there_are_four_tuners_for_them():
    assert PARTS == ["experts", "router", "lora-experts", "lora-router"]


@pytest.mark.parametrize("method", PARTS)
def test_nothing_but_the_part_is_moved(base, tmp_path, method):
    """An adapter is merged into its base first, so that all four are seen alike."""
    run(make_step(base, tmp_path, "sft", method), out=tmp_path / "out")
    trained = tmp_path / "out" / "sft" / "model"
    whole = starting_folder(trained, tmp_path / "whole")
    before, after = weights(base), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    model, _, _ = open_trained(base)
    assert moved == part_of(model, METHODS[method].part or "experts").keys()
    with torch.no_grad():
        one, two = (open_trained(f)[0](input_ids=IDS).logits for f in (trained, whole))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_full_training_moves_the_rest_too(base, tmp_path):
    run(make_step(base, tmp_path, "sft", "full"), out=tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out" / "sft" / "model")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("method", PARTS)
def test_a_dense_model_is_refused(tmp_path, method):
    dense = build_base(tmp_path / "dense")
    with pytest.raises(ConfigurationError, match="expected a mixture of experts"):
        build(make_step(dense, tmp_path, "sft", method), dense, tmp_path / "out")


def test_what_peft_cannot_put_on_an_expert_is_refused(base, tmp_path):
    tuner = Tuner(method="lora-experts", arguments={"lora_dropout": 0.1})
    step = make_step(base, tmp_path, "sft", tuner=tuner)
    with pytest.raises(ConfigurationError, match="lora_dropout"):
        build(step, base, tmp_path / "out")


def test_sites_refuse_them(base):
    """The examples of a batch share a router, so that no bound on one of them would hold."""
    with pytest.raises(ModelError, match="mixture of experts"):
        load_base(Model(path=str(base)), Task(objective="sft", max_length=32))
