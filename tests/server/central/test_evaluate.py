"""What ``fedward evaluate`` says is what TRL, scikit-learn and a hand count say."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.server.central.evaluating import (
    Evaluation,
    Interval,
    as_json,
    evaluate_model,
    figures_of,
)
from fedward.server.central.job import Data, Reward
from fedward.server.central.opening import open_model
from fedward.server.central.scoring import Asked, Scores
from fedward.tuning.small import build_bert, build_tokenizer
from tests.server.central.rig import ROWS, WORDS, build_base, make_step, run, write_rows

QUIET = Console(file=io.StringIO())
NONE: Any = 0  # what scikit-learn says of a class that is never said; its stubs want text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def jobs(base, tmp_path_factory):
    """An sft and a reward job with held-out rows: stage to its report."""
    folder = tmp_path_factory.mktemp("jobs")
    found = {}
    for stage in ("sft", "reward"):
        step = make_step(base, folder, stage, train={"max_steps": 20})
        step = make_step(
            base,
            folder,
            stage,
            train={"max_steps": 20},
            data=Data(train=step.data.train, evaluation=step.data.train),
        )
        (found[stage],) = run(step, out=folder / "out")
    return found


def evaluated(model: str | Path, folder: Path, rows: Any, **given: Any) -> Evaluation:
    data = write_rows(folder / "rows.jsonl", rows)
    return evaluate_model(open_model(str(model)), Asked(data=data, **given), QUIET)


class TestLanguage:
    def test_perplexity_is_that_of_trls_loss(self, jobs, tmp_path):
        found = evaluated(jobs["sft"]["model"], tmp_path, ROWS["sft"], generate=False)
        expected = math.exp(jobs["sft"]["evaluation"]["eval_loss"])
        assert found.figures["perplexity"].value == pytest.approx(expected, rel=1e-3)
        assert "rouge1" not in found.figures

    def test_bits_per_byte_counts_the_answers_bytes(self, jobs, tmp_path):
        found = evaluated(jobs["sft"]["model"], tmp_path, ROWS["sft"], generate=False)
        numbers = found.scores.numbers
        assert numbers["bytes"].tolist() == [len(row["completion"]) for row in ROWS["sft"]]
        bits = numbers["nll"].sum() / math.log(2) / numbers["bytes"].sum()
        assert found.figures["bits_per_byte"].value == pytest.approx(bits)

    def test_a_trained_model_is_better_than_its_base(self, jobs, base, tmp_path):
        trained = evaluated(jobs["sft"]["model"], tmp_path, ROWS["sft"], max_new_tokens=8)
        before = evaluated(base, tmp_path, ROWS["sft"], max_new_tokens=8)
        assert trained.figures["bits_per_byte"].high < before.figures["bits_per_byte"].low
        assert trained.figures["rouge1"].value > before.figures["rouge1"].value

    def test_rouge_of_the_very_words_is_one(self, base, tmp_path):
        first = evaluated(base, tmp_path, ROWS["sft"], max_new_tokens=8)
        said = first.scores.texts["generation"]
        rows = [
            {"prompt": row["prompt"], "completion": text}
            for row, text in zip(ROWS["sft"], said, strict=True)
        ]
        found = evaluated(base, tmp_path, rows, max_new_tokens=8).scores.numbers["rouge1"]
        wordy = [re.search("[a-z0-9]", text.lower()) is not None for text in said]
        assert any(wordy)
        assert found.tolist() == [float(has) for has in wordy]

    def test_messages_are_read_through_the_chat_template(self, base, tmp_path):
        talk = [
            {"messages": [turn("user", f"sign {w}"), turn("assistant", f"is {w}")]} for w in WORDS
        ]
        found = evaluated(base, tmp_path, talk, max_new_tokens=2)
        assert {"perplexity", "rougeL"} <= found.figures.keys()
        # The template writes line breaks around the words; the question does not count.
        for w, size in zip(WORDS, found.scores.numbers["bytes"], strict=True):
            assert len(f"is {w}") <= size <= len(f"is {w}") + 2

    def test_a_conversation_without_an_answer_is_refused(self, base, tmp_path):
        with pytest.raises(DataError, match="last message must be the assistant's"):
            evaluated(base, tmp_path, [{"messages": [turn("user", "sign")]}])

    def test_a_rule_rewards_what_is_written(self, jobs, tmp_path):
        rows = [{"prompt": row["prompt"], "word": row["prompt"].split()[1]} for row in ROWS["sft"]]
        asked = {"reward": Reward(column="word"), "max_new_tokens": 8}
        found = evaluated(jobs["sft"]["model"], tmp_path, rows, **asked)
        said = found.scores.texts["generation"]
        hits = [float(row["word"] in text) for row, text in zip(rows, said, strict=True)]
        assert found.figures["reward"].value == pytest.approx(np.mean(hits))
        assert list(found.figures) == ["reward"]
        never = evaluated(
            jobs["sft"]["model"], tmp_path, rows, reward=Reward(pattern="(?!)"), max_new_tokens=8
        )
        assert never.figures["reward"].value == 0

    def test_prompts_alone_need_a_rule(self, base, tmp_path):
        with pytest.raises(DataError, match="--reward"):
            evaluated(base, tmp_path, [{"prompt": "sign"}])

    def test_a_model_prefers_what_it_was_taught(self, jobs, tmp_path):
        pairs = [
            {"prompt": f"sign {w}", "chosen": f" is {w}", "rejected": f" none {w}"} for w in WORDS
        ]
        found = evaluated(jobs["sft"]["model"], tmp_path, pairs)
        assert found.figures["preference_accuracy"].value == 1.0
        turned = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
        found = evaluated(jobs["sft"]["model"], tmp_path, turned)
        assert found.figures["preference_accuracy"].value == 0.0
        assert found.figures["mean_margin"].high < 0

    def test_what_is_too_long_is_cut_and_told(self, base, tmp_path):
        rows = [{"text": "sign fever " * 200}]
        found = evaluated(base, tmp_path, rows)
        assert found.scores.cut == 1
        assert found.scores.numbers["tokens"][0] == 63  # of 64 positions, the first is not foretold

    def test_trained_vectors_before_the_input_do_not_shift_it(self, base, tmp_path):
        step = make_step(base, tmp_path, "sft", "prompt")
        step = make_step(
            base,
            tmp_path,
            "sft",
            "prompt",
            data=Data(train=step.data.train, evaluation=step.data.train),
        )
        (report,) = run(step, out=tmp_path / "out")
        found = evaluated(report["model"], tmp_path, ROWS["sft"], generate=False)
        expected = math.exp(report["evaluation"]["eval_loss"])
        assert found.figures["perplexity"].value == pytest.approx(expected, rel=1e-3)


class TestReward:
    def test_accuracy_and_margin_are_trls(self, jobs, tmp_path):
        found = evaluated(jobs["reward"]["model"], tmp_path, ROWS["reward"])
        told = jobs["reward"]["evaluation"]
        assert found.figures["preference_accuracy"].value == told["eval_accuracy"]
        assert found.figures["mean_margin"].value == pytest.approx(told["eval_margin"], rel=1e-3)

    def test_rank_correlation_with_gold(self, jobs, tmp_path):
        texts = [{"text": f"sign {w} is {v}"} for w in WORDS for v in WORDS]
        rated = evaluated(
            jobs["reward"]["model"], tmp_path, [{**row, "score": 0} for row in texts]
        ).scores.numbers["rating"]
        rows = [{**row, "score": float(r) ** 3} for row, r in zip(texts, rated, strict=True)]
        found = evaluated(jobs["reward"]["model"], tmp_path, rows)
        assert found.figures["spearman"].value == pytest.approx(1.0)
        turned = [{**row, "score": -float(r)} for row, r in zip(texts, rated, strict=True)]
        found = evaluated(jobs["reward"]["model"], tmp_path, turned)
        assert found.figures["spearman"].value == pytest.approx(-1.0)

    @pytest.mark.parametrize("gold", ["good", None, "nan"])
    def test_gold_must_be_a_number(self, jobs, tmp_path, gold):
        with pytest.raises(DataError, match=r"row 1: column 'score' must hold a number"):
            evaluated(jobs["reward"]["model"], tmp_path, [{"text": "sign", "score": gold}])

    def test_it_writes_nothing_that_a_rule_could_reward(self, jobs, tmp_path):
        with pytest.raises(ConfigurationError, match="writes nothing"):
            evaluated(jobs["reward"]["model"], tmp_path, ROWS["reward"], reward=Reward(pattern="x"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    tokenizer = build_tokenizer([f"sign {w}" for w in WORDS] * 4, 300)
    folder = tmp_path_factory.mktemp("bert") / "model"
    return build_bert(folder, tokenizer, heads=2, layers=1, labels=WORDS[:3])


class TestClassifier:
    def test_figures_are_scikit_learns(self, classifier, tmp_path):
        rows = [
            {"text": f"sign {w} {v}", "label": WORDS[i % 2]}
            for i, w in enumerate(WORDS * 5)
            for v in WORDS
        ]
        found = evaluated(classifier, tmp_path, rows)
        truth = [row["label"] for row in rows]
        said = found.scores.texts["prediction"]
        labels = list(found.scores.labels)
        assert found.confusion() == confusion_matrix(truth, said, labels=labels).tolist()
        occur = sorted(set(truth))
        shares = precision_recall_fscore_support(truth, said, labels=occur, zero_division=NONE)
        expected = cast("list[list[float]]", shares)
        for name, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            figure = found.figures[f"macro_{name}"]
            assert figure.value == pytest.approx(np.mean(values))
            for label, value in zip(occur, values, strict=True):
                assert found.classes[label][name].value == pytest.approx(value)
        assert math.isnan(found.classes[WORDS[2]]["recall"].value)
        accuracy = found.figures["accuracy"]
        assert accuracy.value == pytest.approx(
            np.mean([a == b for a, b in zip(truth, said, strict=True)])
        )
        assert accuracy.low <= accuracy.value <= accuracy.high

    def test_an_unknown_label_is_refused(self, classifier, tmp_path):
        with pytest.raises(DataError, match="the data has itch"):
            evaluated(classifier, tmp_path, [{"text": "sign", "label": "itch"}])

    def test_units_widen_the_interval(self, classifier, tmp_path):
        """Twenty copies of a row are one piece of evidence."""
        rows = [
            {"text": f"sign {w}", "label": WORDS[i % 2], "patient": i}
            for i, w in enumerate(WORDS * 2)
            for _ in range(20)
        ]
        apart = evaluated(classifier, tmp_path, rows).figures["accuracy"]
        together = evaluated(classifier, tmp_path, rows, unit="patient").figures["accuracy"]
        assert apart.value == together.value
        assert together.high - together.low > 2 * (apart.high - apart.low) > 0


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_figure_that_is_no_number_is_null():
    numbers = {"rating": np.ones(3), "score": np.arange(3.0)}
    scores = Scores(numbers=numbers)
    assert math.isnan(figures_of(scores)["spearman"](numbers))
    nan = Interval(value=math.nan, low=math.nan, high=math.nan)
    assert as_json(nan) == {"value": None, "low": None, "high": None}


def test_the_command(jobs, base, tmp_path):
    model = jobs["sft"]["model"]
    own = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS["sft"]]
    data = write_rows(tmp_path / "own.jsonl", own)
    asked = ["evaluate", model, "--data", str(data), "--out", str(tmp_path / "found")]
    named = ["--map", "prompt=question", "--map", "completion=answer", "--max-new-tokens", "4"]
    told = CliRunner().invoke(app, [*asked, *named, "--json"])
    assert told.exit_code == 0, told.output
    written = json.loads(told.stdout)
    assert written == json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert written["rows"] == written["units"] == 4
    rows = [json.loads(x) for x in (tmp_path / "found" / "rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS["sft"]]
    assert all({"nll", "generation", "rougeL"} <= row.keys() for row in rows)
    shown = CliRunner().invoke(app, [*asked, *named])
    assert "bits per byte" in shown.output
    for option, error in (
        (["--map", "prompt"], "NAME=OWN"),
        (["--map", "promt=question"], "--map"),
        ([*named, "--unit", "patient"], "patient"),
    ):
        told = CliRunner().invoke(app, [*asked, *option])
        assert told.exit_code != 0
        assert error in str(told.exception)
    with pytest.raises(ModelError, match="no such folder"):
        open_model("nowhere")
    told = CliRunner().invoke(
        app, ["evaluate", str(base), "--data", str(data), *named, "--reward", str(base / "x.toml")]
    )
    assert isinstance(told.exception, ConfigurationError)
