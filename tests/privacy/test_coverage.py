"""Every tuner on every base with every checkpointing, against brute force; and what is refused."""

import math
import re
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn

from fedward.errors import UncoveredParameters
from fedward.privacy.coverage import coverage
from tests.privacy import tiny

# peft 0.21 asks transformers 5 by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]
INNER = r"^(?!.*embed)"
SINGLE, LOOP = "one pass", "unit by unit"


def wrapped(config: peft.PeftConfig, family: str = "Llama", **changes: Any) -> Any:
    """Makes a model with a PEFT method whose parameters are not at their start."""

    def make(base: str) -> Any:
        model = tiny.classifier() if family == "Bert" else tiny.causal(family, **changes)
        model = model if base == "fp32" else tiny.quantized(model, base)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        for parameter in tiny.trainable(model).values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


def trained(family: str, which: str = "", **changes: Any) -> Any:
    """Makes a model of which the parameters whose names match are trained themselves."""

    def make(base: str) -> Any:
        model = tiny.classifier() if family == "Bert" else tiny.causal(family, **changes)
        model = model if base == "fp32" else tiny.quantized(model, base)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(re.search(which, name) is not None)
        return model

    return make


def of(config: Any, **changes: Any) -> Any:
    return config(task_type="CAUSAL_LM", **changes)


def lora(**changes: Any) -> Any:
    return of(peft.LoraConfig, r=4, **{"target_modules": TARGETS} | changes)


BOTH, FULL, NF4 = ("fp32", "nf4"), ("fp32",), ("nf4", "int8")
METHODS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "lora": (wrapped(lora()), SINGLE, ("fp32", "nf4", "int8")),
    "lora qwen2": (wrapped(lora(), "Qwen2"), SINGLE, BOTH),
    "lora gpt2": (
        wrapped(lora(target_modules=["c_attn"], fan_in_fan_out=True), "GPT2"), SINGLE, FULL,
    ),
    "lora bert": (
        wrapped(
            peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), "Bert"
        ), SINGLE, BOTH,
    ),
    "rslora": (wrapped(lora(use_rslora=True)), SINGLE, BOTH),
    "pissa": (wrapped(lora(init_lora_weights="pissa")), SINGLE, FULL),
    "lora bias": (
        wrapped(lora(lora_bias=True, target_modules=["q_proj"]), "Qwen2"), SINGLE, BOTH,
    ),
    "lora + biases": (wrapped(lora(bias="all"), "Qwen2"), SINGLE, BOTH),
    "lora + head": (wrapped(lora(modules_to_save=["lm_head"])), SINGLE, BOTH),
    "lora + tied head": (
        wrapped(lora(modules_to_save=["lm_head"]), tie_word_embeddings=True), SINGLE, FULL,
    ),
    "ln-tuning": (wrapped(of(peft.LNTuningConfig)), SINGLE, BOTH),
    "bitfit qwen2": (trained("Qwen2", r"bias$"), SINGLE, ("fp32", "nf4", "int8")),
    "bitfit bert": (trained("Bert", r"bias$"), SINGLE, ("fp32", "nf4", "int8")),
    "full but embeddings": (trained("Llama", INNER), SINGLE, FULL),
    "full but embeddings qwen3": (trained("Qwen3", INNER, head_dim=8), SINGLE, FULL),
    "full but embeddings gemma": (trained("Gemma", INNER, head_dim=8), SINGLE, FULL),
    "full but embeddings bert": (trained("Bert", r"^(?!.*_embeddings)"), SINGLE, FULL),
    "full but embeddings gpt2": (trained("GPT2", r"\.h\.|ln_f"), SINGLE, FULL),
    "full": (trained("Llama"), LOOP, FULL),
    "full tied": (trained("Llama", tie_word_embeddings=True), LOOP, FULL),
    "dora": (wrapped(lora(use_dora=True)), LOOP, BOTH),
    "lora embed_tokens": (
        wrapped(lora(target_modules=[*TARGETS, "embed_tokens"])), LOOP, FULL,
    ),
    "lora token indices": (wrapped(lora(trainable_token_indices=[1, 2])), LOOP, FULL),
    "adalora": (
        wrapped(of(peft.AdaLoraConfig, target_modules=TARGETS, init_r=4, total_step=9)), LOOP, BOTH,
    ),
    "ia3": (
        wrapped(of(peft.IA3Config, target_modules=TARGETS, feedforward_modules=["down_proj"])),
        LOOP, BOTH,
    ),
    "vera": (wrapped(of(peft.VeraConfig, r=4, target_modules=["q_proj", "o_proj"])), LOOP, BOTH),
    "loha": (wrapped(of(peft.LoHaConfig, r=4, target_modules=TARGETS)), LOOP, FULL),
    "lokr": (wrapped(of(peft.LoKrConfig, r=4, target_modules=TARGETS)), LOOP, FULL),
    "oft": (wrapped(of(peft.OFTConfig, oft_block_size=8, target_modules=["q_proj"])), LOOP, FULL),
    "prompt": (wrapped(of(peft.PromptTuningConfig, num_virtual_tokens=3)), LOOP, BOTH),
    "prefix": (wrapped(of(peft.PrefixTuningConfig, num_virtual_tokens=3)), LOOP, FULL),
    "prefix + projection": (
        wrapped(
            of(peft.PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True,
               encoder_hidden_size=8)
        ), LOOP, FULL,
    ),
    "p-tuning mlp": (
        wrapped(of(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8)),
        LOOP, BOTH,
    ),
    "p-tuning lstm": (
        wrapped(
            of(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8,
               encoder_reparameterization_type="LSTM", encoder_num_layers=1, encoder_dropout=0.0)
        ), LOOP, FULL,
    ),
}  # fmt: skip


def assert_exact(model: Any, how: str) -> None:
    """A step with about half of the units clipped equals brute force, however it is cut."""
    loss = tiny.losses(tiny.records(9))
    gradients = tiny.unit_gradients(model, tiny.UNITS, loss)
    norms = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in u.values())) for u in gradients]
    clip = 0.9 * sorted(norms)[2]
    expected = tiny.clipped_sum(gradients, clip)
    for physical_batch in (3, 32):
        found, facts = tiny.released(
            model, loss, tiny.mechanism(clip=clip), physical_batch=physical_batch
        )
        assert facts.single_pass == (how == SINGLE)
        assert facts.clipped in (0.6, 0.8)
        assert tiny.distance(expected, found) < 2e-6
    # Negative control: a clip that is a thousandth off is noticed.
    assert tiny.distance(tiny.clipped_sum(gradients, 1.001 * clip), found) > 1e-4


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_exact(name):
    make, how, _ = METHODS[name]
    model = make("fp32")
    assert coverage(model).single_pass == (how == SINGLE)
    assert_exact(model, how)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(("name", "base"), [(n, b) for n, m in METHODS.items() for b in m[2]])
def test_every_method_on_every_base_with_every_checkpointing(name, base, checkpointing):
    make, how, _ = METHODS[name]
    if checkpointing != "none" and name.startswith(("prefix", "p-tuning", "prompt")):
        pytest.skip("PEFT switches checkpointing off for virtual tokens")
    assert_exact(tiny.checkpointed(make(base), checkpointing), how)


def test_what_is_clipped_how_is_said_in_a_sentence():
    model = METHODS["lora"][0]("fp32")
    assert str(coverage(model)) == "12 trainable tensors, clipped per unit in one backward pass"
    said = str(coverage(METHODS["ia3"][0]("fp32")))
    assert "one backward pass a unit, slower, because" in said
    assert "ia3_l.default belongs to a ParameterDict (and 5 more)" in said


def test_the_slow_way_is_said_aloud(caplog):
    model = METHODS["ia3"][0]("fp32")
    tiny.released(model, tiny.losses(tiny.records(9)))
    assert "one backward pass a unit, slower" in caplog.text


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_layers_that_remember_the_batch_are_refused(layer):
    with pytest.raises(UncoveredParameters, match="mixes the units of a batch"):
        coverage(sequential(layer))


def test_half_precision_and_nothing_at_all_are_refused():
    with pytest.raises(UncoveredParameters, match="must be float32"):
        coverage(sequential().to(torch.bfloat16))
    with pytest.raises(UncoveredParameters, match="no trainable parameter"):
        coverage(sequential().requires_grad_(False))


def test_wrappers_that_touch_gradients_before_the_clip_are_refused():
    for wrap in (nn.DataParallel, torch.compile):
        with pytest.raises(UncoveredParameters, match="give the model itself"):
            coverage(wrap(sequential()))


def test_shared_weights_go_to_the_loop():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, second)
    assert coverage(model).single_pass
    second.weight = first.weight
    assert "share a weight" in str(coverage(model))


def test_patched_subclassed_and_parametrized_layers_go_to_the_loop():
    class Fused(nn.Linear):
        pass

    assert "belongs to a Fused" in str(coverage(sequential(Fused(4, 4))))
    model = sequential()
    model[0].__dict__["forward"] = model[0].forward
    assert not coverage(model).single_pass
    model = sequential()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert not coverage(model).single_pass


def test_int8_outliers_and_experts_go_to_the_loop():
    int8 = Linear8bitLt(4, 4, has_fp16_weights=False, threshold=6.0)
    model = sequential(int8.requires_grad_(False))
    assert "int8 outliers over the whole batch" in str(coverage(model))
    int8.state.threshold = 0.0
    assert coverage(model).single_pass
    config = {"num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral = tiny.lora(tiny.causal("Mixtral", **config), target_modules=["q_proj"])
    assert "experts" in str(coverage(mixtral))
