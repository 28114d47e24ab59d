import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedward.errors import ConfigurationError
from fedward.plan import Model, Task, Tuner
from fedward.plan_aggregation import Aggregation
from fedward.tuning.models import load_base
from fedward.tuning.tuners import attach, trainable
from tests.tuning.rig import make_plan

SFT = Task(max_length=32)
IDS = torch.tensor([[5, 6, 7, 8]])


def tuned(folder: Path, **sections: Any) -> PeftModel:
    plan = make_plan(folder, **sections)
    return attach(load_base(plan.model, plan.task)[0], plan)


def lora(**arguments: Any) -> Tuner:
    return Tuner(arguments={"r": 4} | arguments)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_the_start_computes_what_the_base_does(models, name, quantize):
    plan = make_plan(models[name], model=Model(path=str(models[name]), quantize=quantize))
    base = load_base(plan.model, plan.task)[0]
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        after = attach(base, plan).train(False)(input_ids=IDS).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_every_trainable_parameter_gets_a_gradient_and_nothing_else(models, name, quantize):
    model = tuned(models[name], model=Model(path=str(models[name]), quantize=quantize))
    with torch.no_grad():
        for key, parameter in trainable(model).items():
            if "lora_B" in key:
                parameter.fill_(0.01)
    model(input_ids=IDS).logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == parameter.requires_grad, key
        assert not parameter.requires_grad or parameter.dtype == torch.float32


def test_a_classifier_trains_its_head_and_a_language_model_has_none(models):
    heads = {"llama": ("score.", 1), "bert": ("classifier.", 2)}
    for name, (head, count) in heads.items():
        names = [n for n in trainable(tuned(models[name])) if head in n]
        assert len(names) == count
    assert all("lora_" in n for n in trainable(tuned(models["llama"], task=SFT)))
    assert not any("pooler" in n and "lora_" not in n for n in trainable(tuned(models["bert"])))


def test_the_plans_seed_alone_decides_the_start(models):
    states = []
    for draw, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(draw)
        plan = make_plan(models["llama"], seed=seed)
        states.append(trainable(attach(load_base(plan.model, plan.task)[0], plan)))
    first, again, other = states
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)
    for name in (n for n in first if "lora_A" in n):
        bound = first[name].shape[1] ** -0.5
        assert 0.9 * bound < first[name].abs().max() <= bound
        assert abs(first[name].mean()) < 0.1 * bound


class TestFfa:
    def test_a_is_frozen_with_orthonormal_rows(self, models):
        model = tuned(models["llama"], aggregation=Aggregation(scheme="ffa"))
        found = {n: p for n, p in model.named_parameters() if "lora_A" in n}
        assert found
        for part in found.values():
            assert not part.requires_grad
            torch.testing.assert_close(part @ part.T, torch.eye(4), atol=1e-6, rtol=0)
        names = trainable(model)
        assert all("lora_B" in n or "score" in n for n in names)
        assert any("score" in n for n in names)

    def test_a_rank_above_the_width_is_refused(self, models):
        with pytest.raises(ConfigurationError, match="width 64"):
            tuned(models["llama"], tuner=lora(r=65), aggregation=Aggregation(scheme="ffa"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lora_alhpa": 8}, "'lora_alpha'"),
            ({"zzz": 1}, "known keys"),
            ({"r": "8"}, "1 to 1024"),
            ({"r": 0}, "1 to 1024"),
            ({"r": 1025}, "1 to 1024"),
            ({"r": 4, "rank_pattern": {"q_proj": 10**9}}, "1 to 1024"),
            ({"rank_pattern": ["q_proj"]}, "names and ranks"),
            ({"lora_dropout": 0.1}, "0 under privacy"),
            ({"layer_replication": [[0, 1], [0, 1]]}, "unknown key"),
            ({"arrow_config": {"top_k": 1}}, "unknown key"),
            ({"bias": "some"}, "PEFT refuses"),
            ({"target_modules": ["nothing"]}, "not found"),
            ({"task_type": "CAUSAL_LM"}, "leave it out"),
            ({"init_lora_weights": "pissa"}, "leave it out"),
            ({"target_modules": ["embed_tokens"]}, "stay frozen"),
            ({"modules_to_save": ["lm_head"]}, "stay frozen"),
            ({"trainable_token_indices": [1]}, "stay frozen"),
        ],
    )
    def test_what_peft_lacks_or_privacy_forbids(self, models, arguments, message):
        with pytest.raises(ConfigurationError, match=message):
            tuned(models["llama"], task=SFT, tuner=lora(**arguments))

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_tied_embeddings(self, models):
        for arguments in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}):
            with pytest.raises(ConfigurationError, match="stay frozen"):
                tuned(models["qwen2"], task=SFT, tuner=lora(**arguments))


def test_what_the_plan_names_is_trained_and_the_plan_stays_as_it_is(models):
    tuner = lora(target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    before = copy.deepcopy(tuner.arguments)
    names = trainable(tuned(models["llama"], tuner=tuner))
    parts = {name.removesuffix(".weight").split(".default")[0].split(".")[-2] for name in names}
    assert parts == {"q_proj", "input_layernorm", "score"}
    assert tuner.arguments == before
