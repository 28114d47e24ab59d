"""Curves: every point once, also after a resumption; a page that loads nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread

from fedward.server.central.curves import draw, read_curves, write_curves
from fedward.server.central.job import Data
from tests.server.central.rig import build_base, make_step, run


def log(folder: Path, *lines: dict[str, object]) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_step_is_one_point_and_the_loss_comes_first(tmp_path):
    path = log(
        tmp_path,
        {"step": 2, "accuracy": 0.5, "loss": 2.0, "epoch": 0.1},
        {"step": 1, "loss": 3.0, "eval_loss": 4.0, "eval_runtime": 9},
        {"step": 2, "loss": 1.5, "note": "text", "grad_norm": float("nan")},
        {"step": 2, "train_loss": 9.0, "train_runtime": 1.0},
    )
    assert read_curves(path) == {
        "eval_loss": [(1, 4.0)],
        "loss": [(1, 3.0), (2, 1.5)],
        "accuracy": [(2, 0.5)],
    }


def test_nothing_to_draw_makes_no_picture(tmp_path):
    assert not draw(log(tmp_path, {"step": 1, "epoch": 1}), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "log.jsonl"]
    assert write_curves(tmp_path, ["none"]) is None


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A job of six steps with evaluations, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    base = build_base(folder / "base")
    step = make_step(base, folder, "sft")
    step = make_step(
        base,
        folder,
        "sft",
        train={"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        data=Data(train=step.data.train, evaluation=step.data.train),
    )
    run(step, out=folder / "out")
    write_curves(folder / "out", ["sft"])
    return step, folder / "out"


def test_a_job_leaves_its_curves(done):
    step, out = done
    picture = imread(out / "sft" / "curves.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05  # not blank
    page = (out / "curves.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert [at for at, _ in read_curves(out / step.name / "log.jsonl")["eval_loss"]] == [2, 4, 6]


def test_a_resumed_job_has_the_same_curves(done, tmp_path):
    step, before = done
    out = tmp_path / "out"
    shutil.copytree(before, out)
    expected = read_curves(before / "sft" / "log.jsonl")
    shutil.rmtree(out / "sft" / "model")
    (out / "sft" / "report.json").unlink()
    (out / "sft" / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    run(step, out=out, resume=True)
    found = read_curves(out / "sft" / "log.jsonl")
    for name in ("loss", "eval_loss"):
        assert found[name] == expected[name]
    lines = [json.loads(x) for x in (out / "sft" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
