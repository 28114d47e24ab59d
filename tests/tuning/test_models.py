import copy as copies
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedward.errors import InvalidValue, ModelError
from fedward.plan import Model, Task
from fedward.tuning.models import fingerprint, load_base, resolve_model
from fedward.tuning.tuners import attach, trainable
from tests.tuning.rig import LABELS, make_plan

SFT = Task(max_length=32)
CLASSIFY = Task(objective="classify", labels=LABELS, max_length=32)


def load(folder: Path, task: Task, **model: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_base(Model(path=str(folder), **model), task)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copy(models, tmp_path):
    """Copy a model, so that a test may break it."""
    return lambda name: shutil.copytree(models[name], tmp_path / name)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "bert", "classifier"])
def test_every_model_classifies_with_a_float32_head(models, name, quantize):
    base, tokenizer = load(models[name], CLASSIFY, quantize=quantize)
    batch = tokenizer(["chest pain", "headache since Monday"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (2, 3)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    heads = [p for n, p in base.named_parameters() if n.startswith(("score", "classifier"))]
    assert heads and all(p.dtype == torch.float32 for p in heads)
    assert not any(p.requires_grad for p in base.parameters())


NESTED = Gemma3Config(
    text_config={
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attention_dropout": 0.5,
    },
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4,
)
"""A model whose language model has a configuration of its own, and dropout there alone."""

BERT = BertConfig(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    is_decoder=True,
)


@pytest.mark.parametrize("config", [NESTED, BERT], ids=["gemma3", "bert"])
def test_nothing_drops_while_training(models, tmp_path, config):
    def difference(model: PreTrainedModel) -> float:
        ids = torch.tensor([[5, 6, 7, 8]])
        more = {"token_type_ids": torch.zeros_like(ids)} if config is NESTED else {}
        with torch.no_grad():
            one, two = (model.train()(input_ids=ids, **more).logits for _ in range(2))
        return float((one - two).abs().max())

    original = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # theirs
        copies.deepcopy(config)
    )
    assert difference(original) > 0, "control"
    original.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    assert difference(load(tmp_path, SFT)[0]) == 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_model_is_near_the_original_but_not_it(models, quantize):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        exact = load(models["llama"], SFT)[0](input_ids=ids).logits
        close = load(models["llama"], SFT, quantize=quantize)[0](input_ids=ids).logits
    error = (exact - close).norm() / exact.norm()
    assert 0 < error < 0.3


def test_a_head_is_kept_only_for_the_same_labels_in_the_same_order(models):
    names = ("score.weight",)
    kept, again, turned = (
        load(models["classifier"], Task(objective="classify", labels=labels, max_length=32))[0]
        for labels in (LABELS, LABELS, LABELS[::-1])
    )
    for name in names:
        assert torch.equal(kept.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(kept.get_parameter(name), turned.get_parameter(name))
    assert turned.config.id2label == dict(enumerate(LABELS[::-1]))


def test_a_new_head_starts_alike_whatever_was_drawn_before(models):
    torch.manual_seed(1)
    first = load(models["llama"], CLASSIFY)[0].get_parameter("score.weight")
    torch.manual_seed(2)
    second = load(models["llama"], CLASSIFY)[0].get_parameter("score.weight")
    assert torch.equal(first, second)
    assert 0.015 < first.std() < 0.025


def test_a_head_for_another_number_of_classes_is_new(models):
    task = Task(objective="classify", labels=("no", "yes"), max_length=32)
    assert load(models["bert"], task)[0].get_parameter("classifier.weight").shape == (2, 64)


def test_padding_does_not_change_a_classification(models):
    for name in ("classifier", "bert"):
        base, tokenizer = load(models[name], CLASSIFY)
        with torch.no_grad():
            alone, padded = (
                base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                for batch in (
                    tokenizer(["chest pain"], return_tensors="pt"),
                    tokenizer(
                        ["chest pain"], padding="max_length", max_length=20, return_tensors="pt"
                    ),
                )
            )
        torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_without_padding_pads_with_its_end(copy):
    folder = copy("classifier")
    path = folder / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["pad_token"]
    path.write_text(json.dumps(facts))
    base, tokenizer = load(folder, CLASSIFY)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert base.config.pad_token_id == tokenizer.pad_token_id


def test_a_model_inside_an_installed_package_is_found_without_importing_it(
    models, tmp_path, monkeypatch
):
    package = tmp_path / "packaged_model"
    shutil.copytree(models["bert"], package / "model")
    shutil.copytree(models["bert"], package / "model" / "deeper")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = resolve_model(Model(path="package:packaged_model"))
    assert folder == package / "model"
    assert fingerprint(folder) == fingerprint(models["bert"])


class TestFingerprint:
    def test_counts_weights_configuration_tokenizer_and_template(self, copy):
        folder = copy("llama")
        start = fingerprint(folder)
        assert start == fingerprint(folder)
        (folder / "README.md").write_text("words")
        assert fingerprint(folder) == start
        seen = {start}
        for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            with (folder / name).open("ab") as file:
                file.write(b" ")
            seen.add(fingerprint(folder))
        assert len(seen) == 5

    def test_another_model_than_the_plans_is_refused(self, models):
        right = fingerprint(models["llama"])
        load(models["llama"], SFT, sha256=right)
        with pytest.raises(ModelError, match="sha256 is"):
            load(models["llama"], SFT, sha256="0" * 64)

    def test_needs_weights_and_configuration(self, copy):
        folder = copy("llama")
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match="no config"):
            fingerprint(folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="safetensors"):
            fingerprint(folder)


class TestBadModels:
    @pytest.mark.parametrize("path", ["nowhere", "./nowhere/at-all", "/nowhere", "../a/b"])
    def test_unknown_folder(self, path):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(Model(path=path))

    @pytest.mark.parametrize("name", ["no_such_model", "json", "sys", "os.path", "../x", ""])
    def test_package_without_a_model(self, name):
        with pytest.raises(ModelError, match="pip install"):
            resolve_model(Model(path=f"package:{name}"))

    def test_hub_id_that_is_not_here(self):
        with pytest.raises(ModelError, match="hub id"):
            resolve_model(Model(path="fedward/not-in-the-cache"))

    def test_missing_tensor(self, copy):
        folder = copy("llama")
        change_config(folder, num_hidden_layers=3)
        with pytest.raises(ModelError, match="weights are missing"):
            load(folder, SFT)

    def test_tensor_of_another_shape(self, copy):
        folder = copy("llama")
        change_config(folder, intermediate_size=96)
        with pytest.raises(ModelError, match="another shape"):
            load(folder, SFT)

    def test_broken_weights(self, copy):
        folder = copy("llama")
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder, SFT)

    def test_unknown_architecture(self, copy):
        folder = copy("llama")
        change_config(folder, model_type="nonsense")
        with pytest.raises(ModelError, match="cannot be loaded"):
            load(folder, SFT)

    def test_code_of_a_model_never_runs(self, copy):
        folder = copy("llama")
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        change_config(folder, model_type="nonsense", auto_map={"AutoConfig": "evil.Config"})
        with pytest.raises(ModelError, match="trust_remote_code"):
            load(folder, SFT)

    def test_mixture_of_experts(self, copy):
        folder = copy("llama")
        change_config(folder, num_local_experts=8)
        with pytest.raises(ModelError, match="experts"):
            load(folder, SFT)

    def test_adapter_folder(self, copy):
        folder = copy("llama")
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="is an adapter"):
            load(folder, SFT)

    @pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
    def test_encoder_cannot_learn_to_predict_what_it_sees(self, models, objective):
        with pytest.raises(ModelError, match=f"encoder .* '{objective}'"):
            load(models["bert"], Task(objective=objective, max_length=32))

    def test_more_tokens_than_the_model_takes(self, models):
        with pytest.raises(InvalidValue, match="128"):
            load(models["llama"], Task(max_length=129))

    def test_classes_are_needed(self, models):
        with pytest.raises(InvalidValue, match="labels"):
            load(models["llama"], Task(objective="classify", max_length=32))


def test_evaluation_leaves_training_over_nf4_as_it_was(models):
    """On some CPUs bitsandbytes repacks 4-bit layers for inference, and gradients go wrong."""
    path = str(models["llama"])
    plan = make_plan(path, model=Model(path=path, quantize="nf4"), task=SFT)
    model = attach(load_base(plan.model, plan.task)[0], plan)
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in trainable(model).values() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert any(gradient.abs().max() > 0 for gradient in before), "control"
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
