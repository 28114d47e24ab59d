"""The table of tuners: each attaches as it says, and bottlenecks behave like adapters."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from fedward.errors import ConfigurationError
from fedward.plan import Model, Task
from fedward.tuning.bottleneck import Bottleneck
from fedward.tuning.methods import METHODS, check_method, peft_config, without_peft_noise
from fedward.tuning.models import load_base
from fedward.tuning.tuners import trainable

IDS = torch.tensor([[5, 6, 7, 8]])
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"r": 8},
    "oft": {"oft_block_size": 8},
    "adalora": {"init_r": 4, "target_r": 2},
    "prompt": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
    "p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


def attached(folder: Any, method: str, quantize: Any = "none", **arguments: Any) -> PeftModel:
    base, _ = load_base(Model(path=str(folder), quantize=quantize), Task(max_length=32))
    config = peft_config(method, SMALL.get(method, {}) | arguments, TaskType.CAUSAL_LM, steps=10)
    assert config is not None
    with without_peft_noise():
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model.train(False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found = model(input_ids=IDS).logits
    assert isinstance(found, torch.Tensor)
    return found


DENSE = [n for n, m in METHODS.items() if m.config is not None and not m.part]


@pytest.mark.parametrize("method", DENSE)
def test_each_method_trains_little_and_starts_where_the_base_is(models, method):
    base, _ = load_base(Model(path=str(models["llama"])), Task(max_length=32))
    before, size = logits(base), sum(p.numel() for p in base.parameters())
    model = attached(models["llama"], method)
    trained = sum(p.numel() for p in trainable(model).values())
    assert 0 < trained < size / 4
    after = logits(model)[:, -IDS.shape[1] :]
    if METHODS[method].prompts:
        assert not torch.allclose(after, before, atol=1e-4)
    else:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_full_has_no_configuration():
    assert peft_config("full", {}, TaskType.CAUSAL_LM) is None


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("loro", {}, "did you mean 'lora'"),
        ("lora", {"lora_alhpa": 4}, "did you mean 'lora_alpha'"),
        ("lora", {"megatron_core": "os"}, "unknown key"),
        ("lora", {"task_type": "CAUSAL_LM"}, "leave it out"),
        ("lora", {"loraplus_lr_ratio": 4.0}, "unknown key"),
        ("dora", {"use_dora": False}, "leave it out"),
        ("adalora", {"r": 4}, "leave it out"),
        ("full", {"r": 4}, "known keys: none"),
    ],
)
def test_what_a_method_does_not_have_is_refused(method, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        check_method(method, arguments)


def test_what_a_method_has_is_taken():
    check_method("lora+", {"loraplus_lr_ratio": 4.0, "r": 4})
    check_method("houlsby", {"r": 4, "lora_dropout": 0.1})


def test_a_value_that_peft_refuses():
    with pytest.raises(ConfigurationError, match="PEFT refuses it"):
        peft_config("adalora", {"tinit": 9, "tfinal": 9}, TaskType.CAUSAL_LM, steps=10)
    with pytest.raises(ConfigurationError, match="max_steps is missing"):
        peft_config("adalora", {}, TaskType.CAUSAL_LM)


class TestBottleneck:
    @pytest.mark.parametrize(
        ("name", "method", "places"),
        [
            ("llama", "houlsby", {"o_proj", "down_proj"}),
            ("llama", "pfeiffer", {"down_proj"}),
            ("bert", "houlsby", {"attention.output.dense", "output.dense"}),
            ("bert", "pfeiffer", {"output.dense"}),
        ],
    )
    def test_it_stands_where_the_papers_put_it(self, models, name, method, places):
        objective: Any = "classify" if name == "bert" else "sft"
        labels = ("cardiology", "neurology", "surgery") if name == "bert" else ()
        task = Task(objective=objective, labels=labels, max_length=32)
        base, _ = load_base(Model(path=str(models[name])), task)
        config = peft_config(method, {"r": 4}, TaskType.CAUSAL_LM)
        assert config is not None
        config.task_type = None
        model = get_peft_model(base, config)
        found = [n for n, m in model.named_modules() if isinstance(m, Bottleneck)]
        assert len(found) == 2 * len(places)  # two blocks
        for name_ in found:
            assert any(name_.endswith(place) for place in places)
        if name == "bert" and method == "pfeiffer":
            assert not any("attention" in name_ for name_ in found)

    @pytest.mark.parametrize("quantize", ["none", "nf4"])
    def test_it_computes_what_it_says(self, models, quantize):
        model = attached(models["llama"], "pfeiffer", quantize, r=4)
        layer: Any = next(m for m in model.modules() if isinstance(m, Bottleneck))
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            up.normal_()
            x = torch.randn(2, layer.get_base_layer().in_features)
            y = layer.get_base_layer()(x)
            expected = y + torch.nn.functional.gelu(y @ down.T) @ up.T  # the scale is 1
            torch.testing.assert_close(layer(x), expected)
            with model.disable_adapter():
                assert torch.equal(layer(x), y)
        assert down.shape == (4, y.shape[1])

    def test_it_trains_nothing_else_and_every_part_gets_a_gradient(self, models):
        model = attached(models["llama"], "houlsby", r=4).train()
        for name, parameter in trainable(model).items():
            assert ".lora_" in name
            if "lora_B" in name:
                nn.init.normal_(parameter)
        model(input_ids=IDS).logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(model).values())

    def test_it_cannot_be_merged(self, models):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="not linear"):
            attached(models["llama"], "pfeiffer").merge_and_unload()

    def test_a_lora_of_the_same_names_is_another_thing(self, models):
        """Loaded without the mapping, an adapter of this kind must not pass for LoRA."""
        ours = trainable(attached(models["llama"], "pfeiffer", r=4))
        config = LoraConfig(r=4, target_modules=["down_proj"], task_type=TaskType.CAUSAL_LM)
        base, _ = load_base(Model(path=str(models["llama"])), Task(max_length=32))
        plain = trainable(get_peft_model(base, config))
        assert ours.keys() == plain.keys()
        assert any(ours[name].shape != plain[name].shape for name in ours)
