"""``fedward simulate`` from files to a report: what it says and refuses, and how it goes on."""

import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedward import cli
from fedward.server.store import Phase
from fedward.simulations import simulate
from fedward.simulations.case import freeze_case, load_case
from fedward.simulations.grid import FIRST_NODE
from fedward.simulations.second_process import second_process
from tests.simulations import tiny

Rows = Sequence[Mapping[str, Any]]
CANARY = "CANARY-Smith"


@pytest.fixture
def fedward(monkeypatch, capsys):
    """Runs the command line; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedward", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def files(tmp_path, base):
    """A plan file, a data folder and an output folder, as arguments."""
    return make_files(tmp_path, base)


def make_files(
    tmp_path: Path,
    base: Path,
    *replacements: tuple[str, str],
    rows: Rows | None = None,
    test: Rows | None = None,
) -> list[Any]:
    text = tiny.plan_text(base)
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    given = [row for name in "abc" for row in tiny.make_rows(name, 4)] if rows is None else rows
    data = tiny.write_data(tmp_path / "data", given)
    tiny.write_data(data, tiny.make_rows("test", 4) if test is None else test, "test")
    return [plan, "--data", data, "--out", tmp_path / "out", "--federated-only"]


def report_of(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())


def test_a_run_ends_in_a_report_as_json_and_as_a_page(fedward, files, tmp_path):
    code, out, err = fedward("simulate", *files, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == report_of(tmp_path / "out")
    assert report["rounds"] == 2
    assert report["cohorts"] == [["a", "b", "c"]] * 2
    assert len(report["curves"]["federated"]) == 3
    assert all(0 < spent <= 8.0 for spent in report["epsilon"].values())
    assert set(report["bytes_up"]) == {"a", "b", "c"}
    assert len(set(report["bytes_up"].values())) == 1, "every site sends as much"
    assert len(report["coordinator_saw"]["masked"]) == 96
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_comparison_has_every_way_of_training(fedward, files, tmp_path, monkeypatch, cores):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    threads, began = torch.get_num_threads(), list[int]()

    def watched(test, half):
        began.append(half)
        return second_process(test, half)

    monkeypatch.setattr(simulate, "second_process", watched)
    code, out, err = fedward("simulate", *files[:-1])
    assert code == 0, err
    scores = report_of(tmp_path / "out")["accuracy"]
    assert set(scores) >= {"base", "alone", "federated", "central"}
    assert set(scores["alone"]) == {"a", "b", "c"}
    assert all(0 <= score <= 1 for score in scores["alone"].values())
    assert "federated" in out
    assert began == ([1] if cores == 2 else []), "a second process where there is a core for it"
    assert torch.get_num_threads() == threads
    assert not multiprocessing.active_children()


def test_finished_comparisons_are_kept(fedward, files, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert fedward("simulate", *files[:-1])[0] == 0
    results = tmp_path / "out" / "run" / "results"
    before = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    (results / "central.json").unlink()
    assert fedward("simulate", *files[:-1], "--resume")[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"central.json"}


def test_a_base_too_large_to_be_loaded_twice_is_not(fedward, files, monkeypatch):
    monkeypatch.setattr(simulate, "_TWICE", 1000)
    monkeypatch.setattr(simulate, "second_process", None)
    assert fedward("simulate", *files[:-1])[0] == 0


def test_a_finished_run_is_replaced(fedward, files, tmp_path):
    assert fedward("simulate", *files)[0] == 0
    first = (tmp_path / "out" / "run" / "coordinator" / "key").read_bytes()
    assert fedward("simulate", *files)[0] == 0
    assert (tmp_path / "out" / "run" / "coordinator" / "key").read_bytes() != first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html",
        "report.json",
        "run",
    ]


def test_a_finished_run_that_is_resumed_gives_the_same_report(fedward, files, tmp_path):
    assert fedward("simulate", *files)[0] == 0
    before = report_of(tmp_path / "out")
    assert fedward("simulate", *files, "--resume")[0] == 0
    after = report_of(tmp_path / "out")
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


@pytest.fixture
def interrupted(fedward, files, monkeypatch):
    """A run that was interrupted in round 2."""
    real = simulate._Work._committed

    def interrupt(*given):
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate._Work, "_committed", interrupt)
        assert fedward("simulate", *files)[0] == 130
    return files


def test_an_interrupted_run_goes_on_with_resume(fedward, interrupted, tmp_path):
    code, _, err = fedward("simulate", *interrupted, "--resume")
    assert code == 0, err
    report = report_of(tmp_path / "out")
    assert report["rounds"] == 2
    assert len(tiny.facts_of(tmp_path / "out" / "run", Phase.COMMITTED)) == 2


def test_an_interrupted_run_is_not_thrown_away_by_mistake(fedward, interrupted):
    code, _, err = fedward("simulate", *interrupted)
    assert code == 2
    assert "holds an unfinished run: add --resume" in err


def test_another_plan_does_not_go_on_with_the_run(fedward, interrupted):
    plan = interrupted[0]
    plan.write_text(plan.read_text().replace("epsilon = 8.0", "epsilon = 4.0"))
    code, _, err = fedward("simulate", *interrupted, "--resume")
    assert code == 2
    assert "holds a run of another plan" in err


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_data_does_not_go_on_with_the_run(fedward, interrupted, split):
    file = interrupted[2] / f"{split}.jsonl"
    file.write_text(file.read_text().replace("heart", "lung", 1))
    code, _, err = fedward("simulate", *interrupted, "--resume")
    assert code == 2
    assert "holds a run on other data" in err


def test_a_round_committed_in_the_instant_before_a_kill_is_in_the_report(
    fedward, files, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate._Work, "_committed", interrupt)
        assert fedward("simulate", *files)[0] == 130
    assert fedward("simulate", *files, "--resume")[0] == 0
    report = report_of(tmp_path / "out")
    assert report["rounds"] == 2
    assert len(report["curves"]["federated"]) == 3


def test_the_demos_accident_costs_one_site_one_round(fedward, files, tmp_path, monkeypatch):
    def with_accident(options, console):
        case = load_case(options, console)
        return freeze_case(case.plan, options.data, killed="b")

    monkeypatch.setattr(simulate, "load_case", with_accident)
    plan = files[0]
    plan.write_text(plan.read_text().replace("count = 2", "count = 3"))
    rows = [row for name in "abcd" for row in tiny.make_rows(name, 4)]
    tiny.write_data(files[2], rows)
    code, out, err = fedward("simulate", *files)
    assert code == 0, err
    assert report_of(tmp_path / "out")["cohorts"] == [
        ["a", "b", "c", "d"],
        ["a", "c", "d"],
        ["a", "b", "c", "d"],
    ]
    assert "round 2: b left out: no answer at masked" in " ".join(out.split())


def test_text_is_learned_as_well(fedward, tmp_path, base):
    files = make_files(tmp_path, base, ('"classify"', '"sft"'))
    code, _, err = fedward("simulate", *files)
    assert code == 0, err
    loss = report_of(tmp_path / "out")["loss"]
    assert loss["base"] > 0
    assert loss["federated"] > 0


def test_sites_made_by_a_split(fedward, tmp_path, base):
    split = 'split = { by = "label", alpha = 5.0, sites = 3 }'
    files = make_files(tmp_path, base, ('site = "hospital"', split))
    code, _, err = fedward("simulate", *files)
    assert code == 0, err
    assert set(report_of(tmp_path / "out")["epsilon"]) == {"site-0", "site-1", "site-2"}


def test_metric_sums_are_kept_where_the_plan_asks(fedward, tmp_path, base):
    files = make_files(tmp_path, base, ("[cohort]", "[metrics]\nepsilon = 2.0\n[cohort]"))
    code, _, err = fedward("simulate", *files)
    assert code == 0, err
    notes = json.loads((tmp_path / "out" / "run" / "progress.json").read_text())
    assert [set(slots) for slots in notes["slots"]] == [{"loss", "correct", "units"}] * 2
    assert all(spent <= 10.0 for spent in report_of(tmp_path / "out")["epsilon"].values())


def test_without_a_test_file_patients_are_held_out(fedward, tmp_path, base):
    files = make_files(tmp_path, base)
    (tmp_path / "data" / "test.jsonl").unlink()
    assert fedward("simulate", *files)[0] == 0


def test_a_hospital_with_one_patient_takes_part(fedward, tmp_path, base):
    rows = [row for name in "abc" for row in tiny.make_rows(name, 1 if name == "b" else 4)]
    code, _, err = fedward("simulate", *make_files(tmp_path, base, rows=rows))
    assert code == 0, err
    assert report_of(tmp_path / "out")["cohorts"] == [["a", "b", "c"]] * 2


ROW = {"patient": "p", "text": CANARY, "label": "heart", "hospital": "a"}


def rows_with(**changes: Any) -> Rows:
    """The usual rows, and one that does not fit, with a name in it that nobody may see."""
    usual = [row for name in "abc" for row in tiny.make_rows(name, 3)]
    return [*usual, {**ROW, **changes}]


WRONG: dict[str, tuple[int, str, list[tuple[str, str]], dict[str, Rows]]] = {
    "epsilon-0": (2, r"epsilon = 0", [("epsilon = 8.0", "epsilon = 0")], {}),
    "unknown-key": (2, "did you mean 'epsilon'", [("epsilon = 8.0", "epsilom = 8.0")], {}),
    "not-toml": (2, "plan.toml", [("count = 2", "count = = 2")], {}),
    "minimum-2": (2, "minimum = 2", [("minimum = 3", "minimum = 2")], {}),
    "another-model": (
        2,
        "names another model",
        [("[tuner]", f'sha256 = "{"0" * 64}"\n[tuner]')],
        {},
    ),
    "no-model": (1, "no such folder", [('path = "', 'path = "/nowhere')], {}),
    "tuner": (2, "did you mean 'r'", [("r = 2", "rr = 2")], {}),
    "no-column": (1, "no column 'hospitals'", [('"hospital"', '"hospitals"')], {}),
    "no-sites": (1, "makes no sites", [('site = "hospital"', "")], {}),
    "few-sites": (1, "makes 3 sites, but", [("minimum = 3", "minimum = 4")], {}),
    "no-rows": (1, "no records", [], {"rows": []}),
    "no-test": (1, "no records", [], {"test": []}),
    "text": (1, "row 19: column 'text' must hold text", [], {"rows": rows_with(text=[CANARY])}),
    "site": (1, "must hold the name of a site", [], {"rows": rows_with(hospital="")}),
    "label": (
        1,
        "must hold one of the plan's labels",
        [('"classify"', '"classify"\nlabels = ["heart", "lung"]')],
        {"rows": rows_with(label=CANARY)},
    ),
    "template": (
        2,
        "expected '}' before end of string",
        [("[data]", '[data]\ntemplate = "{text"')],
        {},
    ),
    "empty-site": (
        1,
        "without a patient",
        [('site = "hospital"', 'split = { by = "label", alpha = 0.01, sites = 9 }')],
        {},
    ),
}


@pytest.mark.parametrize(("code", "message", "changes", "data"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_message_and_an_exit_code(
    fedward, tmp_path, base, code, message, changes, data
):
    files = make_files(tmp_path, base, *changes, **data)
    found, out, err = fedward("simulate", *files, "--json")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert "CANARY" not in err
    assert err.strip().startswith("error:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x"], "--data needs a PLAN"),
        (["plan.toml"], "a PLAN needs --data"),
        (["nowhere.toml", "--data", "x"], "nowhere.toml"),
        (["plan.toml", "--engine", "spark"], "spark"),
        (["plan.toml", "--seed", "-1"], "-1"),
        (["--unknown"], "--unknown"),
    ],
)
def test_wrong_options_are_exit_code_2(fedward, tmp_path, monkeypatch, base, arguments, message):
    make_files(tmp_path, base)
    monkeypatch.chdir(tmp_path)
    code, out, err = fedward("simulate", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_data_that_is_not_there(fedward, files):
    files[2] = "nowhere"
    code, _, err = fedward("simulate", *files)
    assert code == 1
    assert "nowhere: no such file or folder" in err


def test_two_of_four_sites_leave_the_coordinator_trains_and_they_return(
    fedward, tmp_path, base, monkeypatch
):
    """A plan with ``[fallback]`` from files to a report; the training is a process of its own."""
    notes = tiny.write_data(tmp_path / "public", tiny.make_rows("public", 4))
    job = tmp_path / "job.toml"
    job.write_text(f"""
name = "alone"
stage = "classify"
[model]
path = "{base}"
[tuner]
r = 2
target_modules = ["q_proj"]
[data]
train = "{notes / "train.jsonl"}"
[train]
max_steps = 4
per_device_train_batch_size = 4
learning_rate = 0.05
max_length = 16
""")
    rows = [row for name in "abcd" for row in tiny.make_rows(name, 4)]
    section = ("[cohort]", f'[fallback]\nafter = 1\njob = "{job}"\n[cohort]')
    files = make_files(tmp_path, base, ("count = 2", "count = 3"), section, rows=rows)

    def leave(work, node, message):
        return message.metadata.group_id == "2" and node - FIRST_NODE in (2, 3)

    monkeypatch.setattr(simulate._Work, "_fault", leave)
    code, out, err = fedward("simulate", *files)
    assert code == 0, err
    assert "round 2: trained by the coordinator" in out
    report = report_of(tmp_path / "out")
    everybody = ["a", "b", "c", "d"]
    assert report["cohorts"] == [everybody, [], everybody]
    coordinator = tmp_path / "out" / "run"
    ((attempt, alone),) = tiny.facts_of(coordinator, Phase.FALLBACK)
    (_, first), (_, third) = tiny.facts_of(coordinator, Phase.COMMITTED)
    assert attempt.round == 2
    assert len({facts["adapter"] for facts in (first, alone, third)}) == 3


def test_a_sample_of_the_sites_from_files_to_a_report(fedward, tmp_path, base):
    few = ("[rounds]\n", "[rounds]\nparticipants = 3\n")
    rows = [row for name in "abcdef" for row in tiny.make_rows(name, 2)]
    files = make_files(tmp_path, base, few, rows=rows)
    code, out, err = fedward("simulate", *files)
    assert code == 0, err
    assert "each round asks 3 of 6 sites, by a public draw" in out
    assert "a site that is asked sends " in out
    report = report_of(tmp_path / "out")
    assert [len(cohort) for cohort in report["cohorts"]] == [3, 3]
    asked = {name for cohort in report["cohorts"] for name in cohort}
    assert {name for name, sent in report["bytes_up"].items() if sent} == asked
    assert {name for name, spent in report["epsilon"].items() if spent} == asked
    (tmp_path / "again").mkdir()
    many = ("[rounds]\n", "[rounds]\nparticipants = 7\n")
    code, _, err = fedward("simulate", *make_files(tmp_path / "again", base, many, rows=rows))
    assert code != 0
    assert "participants = 7: expected at most the 6 sites there are" in err


def test_groups_and_a_gate_from_files_to_a_report(fedward, tmp_path, base):
    """Nine hospitals in three groups; the gate refuses whatever moves at all."""
    public = tiny.write_data(tmp_path / "public", tiny.make_rows("public", 4)) / "train.jsonl"
    gate = f'[gate]\ndata = "{public}"\nnorm = 1e-6\nrefusals = 5\n'
    rows = [row for name in "abcdefghi" for row in tiny.make_rows(name, 2)]
    section = ("[cohort]\n", f"{gate}[cohort]\ngroups = 3\n")
    code, out, err = fedward("simulate", *make_files(tmp_path, base, section, rows=rows))
    assert code == 1
    assert "round 1 refused: the mean's norm is" in out
    assert "has no adapter yet: no round is committed" in err
    assert report_of(tmp_path / "out")["rounds"] == 2, "they count, and were paid for"
    open_gate = (
        gate,
        gate.replace("1e-6", "10.0").replace("refusals", "worse_by = 10.0\nrefusals"),
    )
    (tmp_path / "again").mkdir()
    files = make_files(tmp_path / "again", base, section, open_gate, rows=rows)
    code, out, err = fedward("simulate", *files)
    assert (code, "refused" in out) == (0, False), err
    events = tiny.facts_of(tmp_path / "again" / "out" / "run", Phase.COMMITTED)
    assert [len(facts["groups"]) for _, facts in events] == [1 + 3, 1 + 3]
    assert all(facts["gate"]["norm"] > 1e-6 for _, facts in events)
