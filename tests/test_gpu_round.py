"""``make gpu-test``: the same script at toy size on the CPU; as it is, on a GPU."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' and torch's, about CPUs


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gpu_round")


def check(report: dict[str, Any]) -> None:
    assert sorted(report["cohort"]) == sorted(report["training_seconds"])
    assert len(report["cohort"]) == 3
    assert report["moved"]
    # The whole round is spent at every site, and nobody paid more than the plan says.
    assert all(7 < epsilon <= 8 for epsilon in report["epsilon_spent"].values())
    assert min(report["training_seconds"].values()) > 0
    assert report["dp_over_plain"]["least"] > 0.5
    assert report["tokens_per_second"] > 0


def test_the_round_at_toy_size(script, capsys):
    check(script.main(["--quick", "--steps", "1", "--turns", "1"]))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parameters"] == 2 * 16 * (4 * (64 + 64) + 2 * (64 + 128) + (128 + 64))
    assert last["machine"]["device"] != ""


@pytest.mark.gpu
def test_the_round_on_a_gpu(script):
    report = script.main([])
    check(report)
    assert report["dp_over_plain"]["median"] <= 1.05
    assert report["dp_over_plain_memory"] <= 1.03
