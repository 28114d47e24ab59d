"""Every example is a plan that fits the data it names."""

import json
import re
from pathlib import Path

import pytest

from fedward.errors import DataError
from fedward.plan import Plan, load_plan
from fedward.tuning.columns import needed_columns
from fedward.tuning.records import make_sites, read_records
from fedward.tuning.tuners import _configuration

EXAMPLES = Path(__file__).parents[1] / "examples"
PLANS = sorted(EXAMPLES.glob("*.toml"))
DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = {
    "medquad": [
        "id",
        "site",
        "question",
        "answer",
        "qtype",
        "focus",
        "semantic_group",
        "source_url",
    ],
    "med_abstracts": ["id", "text", "label", "label_text"],
    "dolly_fedit": ["id", "site", "category", "instruction", "context", "response"],
}

each = pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)


def data_set(path: Path) -> str:
    """The data set in the command at the plan's top."""
    found = re.search(r"--data \.\./shared/data/(\w+) ", path.read_text())
    assert found is not None
    return found[1]


def rows(plan: Plan, count: int = 200) -> list[dict[str, str]]:
    """Rows with exactly the columns that the plan needs, and each of its labels."""
    made = [{column: f"{column} {i % 7}" for column in needed_columns(plan)} for i in range(count)]
    for number, row in enumerate(made):
        if plan.task.labels:
            row[plan.data.label] = plan.task.labels[number % len(plan.task.labels)]
    return made


def write(folder: Path, made: list[dict[str, str]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_there_are_examples():
    assert {path.stem for path in PLANS} >= {"medquad", "med_abstracts", "medquad-sft"}


@each
def test_the_plan_is_private_and_names_columns_of_its_data(path):
    plan = load_plan(path)
    assert plan.privacy.enabled
    assert set(needed_columns(plan)) <= set(COLUMNS[data_set(path)])
    if plan.task.objective == "classify":
        assert len(plan.task.labels) == len(set(plan.task.labels)) > 1
    _configuration(plan)  # PEFT knows every key of [tuner]


@each
def test_the_plan_makes_enough_sites_of_fitting_rows(path, tmp_path):
    plan = load_plan(path)
    sites = make_sites(read_records(write(tmp_path, rows(plan)), plan), plan.data)
    assert len(sites) >= plan.cohort.minimum


@each
def test_rows_that_do_not_fit_are_refused(path, tmp_path):
    plan, (first, *rest) = load_plan(path), rows(load_plan(path))
    for column in needed_columns(plan):
        lacking = [{k: v for k, v in row.items() if k != column} for row in (first, *rest)]
        with pytest.raises(DataError, match=column):
            read_records(write(tmp_path, lacking), plan)
    if plan.task.labels:
        with pytest.raises(DataError, match="labels"):
            read_records(write(tmp_path, [first | {plan.data.label: "?"}, *rest]), plan)


@each
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not beside this checkout")
def test_the_shared_data_fits(path):
    plan, folder = load_plan(path), DATA / data_set(path)
    found = {}
    for split in ("train", "test"):
        (file,) = folder.glob(f"{split}.jsonl*")
        found[split] = read_records(file, plan)
    sites = make_sites(found["train"], plan.data)
    assert len(sites) >= plan.cohort.minimum
    assert all(records.units for records in sites.values())


def test_the_page_shows_the_command_of_every_example():
    page = (EXAMPLES / "README.md").read_text()
    for path in PLANS:
        command = f"fedward simulate examples/{path.name} --data ../shared/data/{data_set(path)}"
        assert command in page
        assert command in path.read_text()
