"""Federated preferences are learned where anybody can check: examples/preferences, end to end."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedward.plan import Plan, from_json, load_plan
from fedward.server.store import Phase
from fedward.simulations.case import Options
from fedward.simulations.comparison import evaluate_adapter
from fedward.simulations.simulate import run_simulation
from fedward.tuning.records import make_sites, read_records
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny

EXAMPLES = Path(__file__).parents[2] / "examples" / "preferences"
FOLDERS = {"dpo": "pairs", "kto": "answers"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    runpy.run_path(str(EXAMPLES / "prepare.py"))["main"](folder)
    return folder


def plan_file(work: Path, objective: str, epsilon: str = "8.0") -> Path:
    text = (EXAMPLES / f"{objective}.toml").read_text()
    assert f"out/preferences/{FOLDERS[objective]} " in text, "the command at its top"
    text = text.replace("out/preferences", str(work)).replace(
        "epsilon = 8.0", f"epsilon = {epsilon}"
    )
    path = work / f"{objective}-{epsilon}.toml"
    path.write_text(text)
    return path


def preferred(plan: Plan, adapter: bytes, work: Path) -> float:
    """Share of the held-out pairs of which the better answer is the likelier one."""
    dpo = load_plan(plan_file(work, "dpo"))
    assert dpo.tuner == plan.tuner
    pairs = read_records(work / "pairs" / "test.jsonl", dpo)
    found = evaluate_adapter(dpo, adapter, pairs).accuracy
    assert found is not None
    return found


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_plans_are_private_and_their_data_fit(objective, tmp_path):
    example = runpy.run_path(str(EXAMPLES / "prepare.py"))
    rows = {"pairs": example["pairs"]("train")}
    rows["answers"] = example["single"](rows["pairs"])
    plan = load_plan(EXAMPLES / f"{objective}.toml")
    assert plan.privacy.enabled
    folder = tiny.write_data(tmp_path, rows[FOLDERS[objective]])
    sites = make_sites(read_records(folder / "train.jsonl", plan), plan.data)
    assert [len(records.units) for records in sites.values()] == [300] * 4


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", ["8.0", "inf"])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_federation_learns_what_is_preferred(work, tmp_path, objective, epsilon, record_property):
    options = Options(
        plan=plan_file(work, objective, epsilon),
        data=work / FOLDERS[objective],
        model=None,
        out=tmp_path / "out",
        compare=False,
    )
    report: Any = run_simulation(options, Console(quiet=True))
    before, after = report["accuracy"]["base"], report["accuracy"]["federated"]
    plan = from_json((tmp_path / "out" / "run" / "plan.json").read_bytes())
    run = tmp_path / "out" / "run"
    (*_, facts) = [facts for _, facts in tiny.facts_of(run, Phase.COMMITTED)]
    first = preferred(plan, tuned_model(plan).start, work)
    last = preferred(plan, tiny.blob(run, facts["adapter"]), work)
    record_property("found", json.dumps([before, after, first, last]))
    assert len(facts["cohort"]) == 4
    assert first <= 0.65
    assert last >= 0.9
    assert after >= before + 0.2
