"""A search: a closed vocabulary, trials that are jobs, the best of them, and resumption."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from fedward import typed_toml
from fedward.cli import app
from fedward.errors import ConfigurationError
from fedward.server.central.job import load_job
from fedward.server.central.searching import search
from fedward.server.central.space import Search
from tests.server.central.rig import ROWS, build_base, write_rows

SPACE = """
trials = 4
workers = 2
seed = 1
[space]
train.learning_rate = { loguniform = [1e-7, 1e-1] }
tuner.r = { choice = [2, 4] }
seed = { randint = [1, 3] }
"""


def read(folder: Path, text: str) -> Search:
    (folder / "space.toml").write_text(text)
    return typed_toml.load(Search, folder / "space.toml")


def write_job(folder: Path) -> Path:
    base = build_base(folder / "base")
    rows = write_rows(folder / "rows.jsonl", ROWS["sft"])
    job = {
        "name": "tried",
        "stage": "sft",
        "model": {"path": str(base)},
        "tuner": {"method": "lora"},
        "data": {"train": str(rows), "evaluation": str(rows)},
        "train": {
            "max_steps": 4,
            "max_length": 32,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    }
    (folder / "job.toml").write_text(tomli_w.dumps(job))
    return folder / "job.toml"


class TestSpace:
    def test_draws_are_inside_and_follow_from_the_seed(self, tmp_path):
        asked = read(tmp_path, SPACE.replace("trials = 4", "trials = 200"))
        drawn = asked.drawn()
        rates = [each["train", "learning_rate"] for each in drawn]
        assert all(1e-7 <= rate <= 1e-1 for rate in rates)
        assert 0.35 < sum(rate < 1e-4 for rate in rates) / 200 < 0.65  # as many in each decade
        assert {each["tuner", "r"] for each in drawn} == {2, 4}
        assert {each["seed",] for each in drawn} == {1, 2, 3}
        assert asked.drawn() == drawn
        other = SPACE.replace("seed = 1", "seed = 2").replace("trials = 4", "trials = 200")
        assert read(tmp_path, other).drawn() != drawn

    @pytest.mark.parametrize(
        ("line", "error"),
        [
            ("", "expected keys of the job"),
            ("model.path = { choice = ['a'] }", "seed or a section"),
            ("train = { choice = [1] }", "train.choice"),
            ("train.x = 3", "one of { choice"),
            ("train.x = { normal = [0, 1] }", "one of { choice"),
            ("train.x = { uniform = [1, 0] }", "the smaller first"),
            ("train.x = { uniform = [0, true] }", "the smaller first"),
            ("train.x = { loguniform = [0, 1] }", "above 0"),
            ("train.x = { randint = [0.5, 2] }", "two whole numbers"),
            ("train.x = { choice = [] }", "a list of values"),
        ],
    )
    def test_the_vocabulary_is_closed(self, tmp_path, line, error):
        with pytest.raises(ConfigurationError, match=error):
            read(tmp_path, f"[space]\n{line}\n")

    @pytest.mark.parametrize(
        "line", ["trials = 0", "workers = 0", "reduction = 1", "metric = 'loss'", "mode = 'up'"]
    )
    def test_limits(self, tmp_path, line):
        with pytest.raises(ConfigurationError, match=line.partition(" ")[0]):
            read(tmp_path, f"{line}\n[space]\nseed = {{ randint = [0, 1] }}\n")


class TestJobs:
    def refused(self, job: Path, space: str) -> str:
        (job.parent / "space.toml").write_text(space)
        quiet = Console(file=io.StringIO())
        with pytest.raises(ConfigurationError) as told:
            search(job, job.parent / "space.toml", job.parent / "out", quiet)
        assert not (job.parent / "out").exists()
        return str(told.value)

    def test_every_trial_is_checked_before_any_runs(self, tmp_path):
        job = write_job(tmp_path)
        space = "[space]\ntuner.rr = { choice = [2] }\n"
        assert "rr" in self.refused(job, space)

    def test_there_must_be_something_to_judge_by(self, tmp_path):
        job = write_job(tmp_path)
        job.write_text(job.read_text().replace('eval_strategy = "steps"\n', ""))
        assert "eval_strategy" in self.refused(job, SPACE)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
def test_the_best_is_found_and_an_interrupted_search_goes_on(tmp_path):
    job = write_job(tmp_path)
    (tmp_path / "space.toml").write_text(SPACE)
    out = tmp_path / "out"
    asked = ["train", str(job), "--search", str(tmp_path / "space.toml"), "--out", str(out)]
    told = CliRunner().invoke(app, [*asked, "--json"])
    assert told.exit_code == 0, (told.output, told.exception)
    found = json.loads(told.stdout)
    assert found == json.loads((out / "search.json").read_text())
    finished = [trial for trial in found["trials"] if trial["state"] == "finished"]
    assert finished
    assert "stopped" in [trial["state"] for trial in found["trials"]]
    assert all(trial["score"] is not None for trial in found["trials"])
    assert found["best"]["score"] == min(trial["score"] for trial in finished)
    assert all(trial["evaluations"] == 4 for trial in finished)

    best = load_job(out / "best.toml")
    values = found["best"]["values"]
    assert best.steps[0].train.arguments["learning_rate"] == values["train.learning_rate"]
    told = CliRunner().invoke(app, ["train", str(out / "best.toml"), "--out", str(tmp_path / "b")])
    assert told.exit_code == 0, told.output
    (report,) = (json.loads(p.read_text()) for p in (tmp_path / "b").glob("*/report.json"))
    assert report["evaluation"]["eval_loss"] == pytest.approx(found["best"]["score"], abs=1e-6)

    # As if it had been killed: one trial in its middle, one not begun.
    one, other = (out / trial["trial"] / "tried" for trial in found["trials"][:2])
    for name in ("report.json", "model"):
        path = one / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for checkpoint in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(one / "checkpoints" / checkpoint, ignore_errors=True)
    shutil.rmtree(other)
    told = CliRunner().invoke(app, asked)
    assert "use --resume" in str(told.exception)
    told = CliRunner().invoke(app, [*asked, "--resume", "--json"])
    assert told.exit_code == 0, (told.output, told.exception)
    again = json.loads(told.stdout)
    assert again["best"]["score"] == pytest.approx(found["best"]["score"], abs=1e-6)
    (tmp_path / "space.toml").write_text(SPACE.replace("trials = 4", "trials = 5"))
    told = CliRunner().invoke(app, [*asked, "--resume"])
    assert "another" in str(told.exception)
