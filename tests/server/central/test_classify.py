"""The stage ``classify``: classes are learned, kept by what starts from them, and used."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from fedward.errors import DataError
from fedward.plan import Model
from fedward.server.central.job import Data, Keep, Step
from fedward.server.central.loading import open_trained
from fedward.server.central.manifest import read_manifest
from fedward.server.central.predicting import predict
from fedward.server.central.stages import build
from fedward.tuning.small import build_bert, build_tokenizer
from tests.server.central.rig import WORDS, build_base, make_step, run, write_rows


def rows(*openings: str) -> list[dict[str, Any]]:
    return [{"text": f"{said} {word}", "label": word} for said in openings for word in WORDS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model")


def classify(base: Path, folder: Path, name: str = "classify", **given: Any) -> Step:
    """Six ways to name a sign are trained, two others are held out."""
    folder.mkdir(exist_ok=True)
    train = write_rows(folder / "train.jsonl", rows("sign", "a", "the", "had", "no", "is"))
    held_out = write_rows(folder / "held-out.jsonl", rows("some", "with"))
    data = given.pop("data", Data(train=str(train), evaluation=str(held_out)))
    usual = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    train_keys = {**usual, **given.pop("train", {})}
    method = given.pop("method", "lora")
    step = make_step(base, folder, "classify", method, name=name, data=data, train=train_keys)
    return Step(**{**vars(step), **given})


def test_classes_are_learned_kept_by_the_next_step_and_told(base, tmp_path):
    first = classify(base, tmp_path)
    still = classify(
        base, tmp_path, "still", model=Model(path="step:classify"), train={"learning_rate": 0.0}
    )
    learned, kept = run(first, still, out=tmp_path / "out")
    assert learned["evaluation"]["eval_accuracy"] >= 0.9
    assert kept["evaluation"]["eval_accuracy"] == learned["evaluation"]["eval_accuracy"]

    model = tmp_path / "out" / "classify" / "model"
    manifest = read_manifest(model)
    assert manifest is not None
    assert (manifest.kind, manifest.labels) == ("classifier", tuple(sorted(WORDS)))
    said = tmp_path / "said.jsonl"
    predict(model, tmp_path / "held-out.jsonl", said, Console(file=io.StringIO()))
    found = [json.loads(line) for line in said.read_text().splitlines()]
    right = sum(row["prediction"] == row["label"] for row in found) / len(found)
    assert right == learned["evaluation"]["eval_accuracy"]


def test_nothing_learned_tells_no_classes_apart(base, tmp_path):
    (report,) = run(classify(base, tmp_path, train={"learning_rate": 0.0}), out=tmp_path / "out")
    assert report["evaluation"]["eval_accuracy"] <= 0.5


def test_what_it_knew_is_weighed_and_measured(base, tmp_path):
    old = write_rows(tmp_path / "old.jsonl", rows("old"))
    keep = Keep(data=str(old), evaluation=str(old), replay=0.3, ewc=1.0, ewc_examples=4)
    (report,) = run(classify(base, tmp_path, keep=keep, train={"max_steps": 2}), out=tmp_path)
    before, after = report["kept"]["before"], report["kept"]["after"]
    assert {"loss", "accuracy"} <= before.keys() == after.keys()
    assert before["loss"] != after["loss"]


@pytest.mark.parametrize("change", ["accumulated", "checkpointed"])
def test_the_same_rows_give_the_same_weights(base, tmp_path, change):
    def trained(name: str, model: Model, **train: Any) -> dict[str, torch.Tensor]:
        step = classify(base, tmp_path, name, model=model, train={"max_steps": 3, **train})
        run(step, out=tmp_path / "out")
        loaded, _, _ = open_trained(tmp_path / "out" / name / "model")
        return dict(loaded.named_parameters())

    plain = trained("plain", Model(path=str(base)))
    other = (
        trained(
            "other",
            Model(path=str(base)),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        if change == "accumulated"
        else trained("other", Model(path=str(base), gradient_checkpointing=True))
    )
    for name, parameter in plain.items():
        torch.testing.assert_close(other[name], parameter, atol=1e-5, rtol=0)
    # Negative control: half of the rows are somewhere else.
    half = trained("half", Model(path=str(base)), per_device_train_batch_size=4)
    assert any((half[name] - plain[name]).abs().max() > 1e-3 for name in plain)


def test_a_text_too_long_keeps_an_encoders_last_token(tmp_path):
    tokenizer = build_tokenizer([row["text"] for row in rows("sign", "a")] * 4, 300)
    end = tokenizer.eos_token_id
    closing = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", end)])
    tokenizer.backend_tokenizer.post_processor = closing
    bert = build_bert(tmp_path / "bert", tokenizer)
    data = Data(train=str(write_rows(tmp_path / "long.jsonl", rows("sign " * 30, "a"))))
    step = classify(bert, tmp_path, method="full", data=data, train={"max_length": 8})
    trainer = build(step, bert, tmp_path / "checkpoints")
    given = [row["input_ids"] for row in trainer.train_dataset]
    assert max(map(len, given)) == 8
    assert all(ids[-1] == end for ids in given)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (rows("sign"), [{"text": "x", "label": "gout"}], "label 'gout': the model knows cough, "),
        (rows("sign")[:1], rows("sign")[:1], "expected two labels or more, got cough"),
        ([{"text": "x", "label": 1.5}], rows("sign"), "'label' must hold text or a whole number"),
    ],
)
def test_classes_that_do_not_fit(base, tmp_path, train, held_out, message):
    data = Data(
        train=str(write_rows(tmp_path / "a.jsonl", train)),
        evaluation=str(write_rows(tmp_path / "b.jsonl", held_out)),
    )
    with pytest.raises(DataError, match=message):
        build(classify(base, tmp_path, data=data), base, tmp_path / "checkpoints")
