"""A local task of lm-evaluation-harness, where that extra is installed."""

import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ConfigurationError
from tests.server.central.rig import WORDS, build_base, make_step, run, write_rows

TASK = """
task: signs
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [" is cough", " is fever", " is rash", " is pain"]
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model")


def tasks(folder: Path) -> Path:
    rows = [{"prompt": f"sign {word}", "answer": n} for n, word in enumerate(WORDS)]
    data = write_rows(folder / "rows.jsonl", rows * 5)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "signs.yaml").write_text(TASK.format(data=data))
    return folder / "tasks"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is an extra")
@pytest.mark.filterwarnings("ignore")
def test_a_trained_model_is_better_than_its_base(base, tmp_path, monkeypatch):
    asked = list[str]()

    def look_up(host: object, *_: object, **__: object) -> object:
        asked.append(str(host))
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    step = make_step(base, tmp_path, "sft", train={"max_steps": 120})
    (report,) = run(step, out=tmp_path / "out")
    folder, found = tasks(tmp_path), {}
    for model in (str(base), report["model"]):
        line = ["evaluate", model, "--harness", "signs", "--tasks", str(folder), "--json"]
        told = CliRunner().invoke(app, [*line, "--out", str(tmp_path / "found")])
        assert told.exit_code == 0, (told.output, told.exception)
        written = json.loads((tmp_path / "found" / "harness.json").read_text())
        assert written["rows"] == 20
        found[model] = written["figures"]["acc"]["value"]
    assert found[report["model"]] == 1.0 > found[str(base)]
    told = CliRunner().invoke(
        app, ["evaluate", str(base), "--harness", "x", "--tasks", str(folder)]
    )
    assert "signs" in str(told.exception)
    assert asked == []


def test_one_of_data_and_task_is_asked_for(base, tmp_path):
    for given in ([], ["--data", str(tmp_path / "x.jsonl"), "--harness", "signs"]):
        told = CliRunner().invoke(app, ["evaluate", str(base), *given])
        assert isinstance(told.exception, ConfigurationError)
        assert "--data FILE, or --harness TASK" in str(told.exception)


def test_without_the_extra_the_message_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = CliRunner().invoke(app, ["evaluate", str(base), "--harness", "signs"])
    assert "fedward[harness]" in str(told.exception)
