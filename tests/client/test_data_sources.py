"""Where the records lie and what their columns are called, only the site says."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedward.client.data_sources import (
    Columns,
    DataSource,
    add_model,
    load_source,
    model_folder,
    source_names,
)
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import add_source, files_identity, look, site_records
from fedward.errors import ConfigurationError, DataError, InvalidValue, ModelError
from fedward.plan import Data, Model, Plan, Split, Task
from fedward.tuning.models import fingerprint
from tests.client.test_policy import PLAN

ROWS: list[dict[str, Any]] = [
    {"note": "a", "code": "flu", "mrn": 1},
    {"note": "b", "code": "cold", "mrn": 1},
    {"note": "c", "code": "flu", "mrn": 2},
    {"note": "d", "code": "flu", "mrn": ""},
]
CLASSIFY: Plan = dataclasses.replace(
    PLAN,
    task=Task(objective="classify", labels=("cold", "flu")),
    data=Data(text="text", label="label", unit="patient"),
)
COLUMNS = Columns(names={"text": "note", "label": "code"})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "notes.csv"
    write(path, ROWS)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    return SiteFolder.create(tmp_path / "site", SiteConfig(name="a"))


def source(file: Path, **changes: Any) -> DataSource:
    given = DataSource(path=str(file), unit="mrn", columns=COLUMNS)
    return dataclasses.replace(given, **changes)


def test_a_source_is_kept_as_it_was_added(folder, file):
    facts = add_source(folder, "notes", source(file))
    assert (facts.rows, facts.units, facts.without_unit) == (4, 2, 1)
    assert (facts.columns, facts.held_out) == (("note", "code", "mrn"), None)
    assert load_source(folder, "notes") == source(file)
    assert source_names(folder) == ["notes"]
    add_source(folder, "notes", source(file, unit=None, unit_is_record=True))
    assert load_source(folder, "notes").unit_is_record


def test_records_come_in_the_words_of_the_plan(file):
    train, apart = site_records(source(file), CLASSIFY)
    assert apart is None
    assert train.rows[0] == {"text": "a", "label": "flu", "unit of privacy": "1"}
    assert train.units == ((0, 1), (2,))


def test_a_plan_for_rows_is_read_for_patients_where_the_site_says_who_they_are(file):
    rows_only = dataclasses.replace(CLASSIFY, data=Data())
    assert len(site_records(source(file), rows_only)[0].units) == 2
    single = source(file, unit=None, unit_is_record=True)
    assert len(site_records(single, rows_only)[0].units) == 4, "control"
    assert len(site_records(single, CLASSIFY)[0].units) == 4, "and this is the site's to say, too"


@pytest.mark.parametrize("changes", [{"unit": None}, {"unit_is_record": True}])
def test_whom_privacy_protects_must_be_said_once(file, changes):
    with pytest.raises(InvalidValue, match="or else unit_is_record = true"):
        source(file, **changes)


@pytest.mark.parametrize(
    "data",
    [
        Data(text="mrn", label="label"),
        Data(text="patient", label="label", unit="patient"),
        Data(template="{text} {mrn}", label="label"),
        Data(text="note", label="label"),
    ],
)
def test_a_column_that_is_not_declared_is_not_read(file, data):
    """Nor the one that names the patient, by whatever name the plan asks for it."""
    with pytest.raises(ConfigurationError, match="does not declare"):
        site_records(source(file), dataclasses.replace(CLASSIFY, data=data))


def test_a_unit_of_a_declared_column_s_name_does_not_take_its_place(file):
    data = Data(text="text", label="label", unit="text")
    rows = site_records(source(file), dataclasses.replace(CLASSIFY, data=data))[0].rows
    assert [row["text"] for row in rows] == ["a", "b", "c"]


def test_a_file_that_was_written_to_is_another(file):
    before, stat = files_identity(source(file)), file.stat()
    assert files_identity(source(file)) == before
    data = file.read_bytes()
    file.write_bytes(data.replace(b"flu", b"flo"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times does
    assert file.stat().st_size == stat.st_size
    changed = files_identity(source(file))
    assert changed != before
    other = file.with_name("other.csv")
    other.write_bytes(data)
    other.replace(file)
    assert files_identity(source(file)) not in {before, changed}


def test_what_only_simulations_have_does_not_matter_here(file):
    for data in (
        Data(unit="patient", site="hospital"),
        Data(unit="patient", split=Split(by="label", alpha=1.0, sites=3)),
    ):
        plan = dataclasses.replace(CLASSIFY, data=data)
        assert len(site_records(source(file), plan)[0].units) == 2


def test_a_share_of_the_patients_is_kept_apart(tmp_path):
    path = tmp_path / "notes.csv"
    rows = [{"note": "x", "code": "flu", "mrn": i // 2} for i in range(400)]
    write(path, rows)
    train, apart = site_records(source(path), CLASSIFY, held_out=0.25)
    assert apart is not None
    assert len(train.units) + len(apart.units) == 200
    assert 30 < len(apart.units) < 70  # 3 standard deviations are 18
    mine, theirs = ({row["unit of privacy"] for row in part.rows} for part in (train, apart))
    assert not mine & theirs
    assert site_records(source(path), CLASSIFY, held_out=0.25)[1] == apart, "the same each time"
    write(path, rows[2:300] + rows[302:])
    fewer = site_records(source(path), CLASSIFY, held_out=0.25)
    for part, before in zip(fewer, (mine, theirs), strict=True):
        assert part is not None
        now = {row["unit of privacy"] for row in part.rows}
        assert now == before - {"0", "150"}, "who goes moves nobody else"


def test_a_folder_with_a_test_file_keeps_that_apart(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "test.csv", ROWS[:2])
    train, apart = site_records(source(tmp_path), CLASSIFY, held_out=0.5)
    assert apart is not None
    assert (len(train.units), len(apart.units)) == (2, 1)
    assert look(source(tmp_path)).held_out == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "mrm"}, "no column 'mrm'; did you mean 'mrn'"),
        ({"columns": Columns(names={"text": "nota"})}, "no column 'nota'; did you mean 'note'"),
        ({"path": "/none.csv"}, "no such file"),
    ],
)
def test_a_source_that_does_not_fit_its_file_is_not_added(folder, file, change, message):
    with pytest.raises(DataError, match=message):
        add_source(folder, "notes", source(file, **change))
    assert source_names(folder) == []


def test_a_name_is_a_name(folder, file):
    for name in ("", "../x", "a b"):
        with pytest.raises(InvalidValue):
            add_source(folder, name, source(file))
    with pytest.raises(ConfigurationError, match="known: none"):
        load_source(folder, "notes")


@pytest.mark.parametrize("text", ["path = 1", 'path = "x"\n[columns]\ntext = 1', 'pfad = "x"'])
def test_a_broken_file_of_a_source_is_named(folder, text):
    (folder.data / "notes.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"notes\.toml"):
        load_source(folder, "notes")


def test_jsonl_is_read_alike(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    assert site_records(source(path), CLASSIFY)[0].units == ((0, 1), (2,))


def test_a_model_is_found_by_its_digest_and_never_by_the_plans_path(folder, base):
    digest = add_model(folder, base)
    assert digest == add_model(folder, base) == fingerprint(base)
    plan = dataclasses.replace(PLAN, model=Model(path="/etc", sha256=digest))
    assert model_folder(folder, plan).resolve() == base.resolve()
    for model in (
        Model(path=str(base)),
        Model(path=str(base), sha256="0" * 64),
    ):
        with pytest.raises(ModelError, match="site model add"):
            model_folder(folder, dataclasses.replace(PLAN, model=model))


def test_what_is_no_model_is_not_added(folder, tmp_path):
    with pytest.raises(ModelError):
        add_model(folder, tmp_path)
