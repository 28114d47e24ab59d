"""What the fault test asks of each case, and the table that it writes."""

from typing import Any

import pytest

from tests.field import cases, faults_page

OTHERS = ["northgate", "valley", "summit"]
ROW: dict[str, Any] = {
    "fault": "agent stands still for 90 s",
    "stage": "training",
    "attempt": 1,
    "cohort": OTHERS,
    "left_out": ["harbour: no answer"],
    "spent": 0,
    "seconds": 80,
}


def case_of(row: dict[str, Any]) -> cases.Case:
    (found,) = [c for run in cases.RUNS for c in run.cases if c.fault == row["fault"]
                and c.stage == row["stage"]]  # fmt: skip
    return found


def test_the_pairs_are_different_and_a_run_does_not_begin_between_two_rounds():
    pairs = [(c.fault, c.stage) for run in cases.RUNS for c in run.cases if c.fault != "none"]
    assert len(set(pairs)) == len(pairs)
    assert all(run.cases[0].stage != "between" for run in cases.RUNS)


def test_another_sum_or_another_log_than_what_should_be_is_named():
    case = case_of(ROW)
    case.check(ROW, "")
    for cohort in (["harbour", *OTHERS], ["harbour", "valley", "summit"], ["valley"]):
        with pytest.raises(AssertionError, match=r"stands still for 90 s, training"):
            case.check({**ROW, "cohort": cohort}, "")
    half_open = {**ROW, "fault": "half-open connection, 40 s", "cohort": ["a", "b", "c", "d"]}
    case_of(half_open).check(half_open, "WARNING: the coordinator cannot be reached: ReadTimeout")
    with pytest.raises(AssertionError, match="is not in"):
        case_of(half_open).check(half_open, "nothing to see")


def test_the_table_goes_between_its_marks_and_keeps_what_other_runs_wrote(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- processes -->\nold\n<!-- end of processes -->\nafter\n")
    faults_page.write(page, [ROW])
    later = {**ROW, "stage": "masked", "cohort": ["harbour", *OTHERS], "left_out": []}
    faults_page.write(page, [later])
    faults_page.write(page, [{**later, "seconds": 81}])
    text = page.read_text()
    assert text.startswith("before\n<!-- processes -->\n| fault |")
    assert text.endswith("\n2 pairs.\n<!-- end of processes -->\nafter\n")
    assert "old" not in text
    assert text.count("| agent stands still for 90 s | training | 1 / 3 / 0 | 80 |") == 1
    assert text.count("| agent stands still for 90 s | masked | 1 / 4 / 0 | 81 | nothing |") == 1
    assert "left out: no answer" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no part"):
        faults_page.write(page, [ROW])
