import gzip
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.errors import DataError
from fedward.plan import Data, Plan, Split, Task
from fedward.tuning import records
from fedward.tuning.records import (
    Table,
    find_splits,
    group,
    hold_out,
    labels_of,
    make_sites,
    merge,
    read_records,
    select,
)
from tests.tuning.rig import LABELS, ROWS, make_plan

CANARY = "CANARY Mrs Jane Roe"


def plan(**sections: Any) -> Plan:
    return make_plan("anywhere", **sections)


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def written(folder: Path, kind: str) -> Path:
    """The rig's rows in one kind of file."""
    if kind == "parquet":
        path = folder / "train.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(path)
        return path
    lines = [json.dumps(row) for row in ROWS]
    if kind.startswith("csv"):
        lines = [",".join(ROWS[0])]
        lines += [",".join(f'"{value}"' for value in row.values()) for row in ROWS]
    data = "\n".join(lines).encode()
    path = folder / f"train.{kind}"
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


class TestReading:
    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "parquet"])
    def test_every_kind_of_file_gives_the_same(self, tmp_path, kind):
        found = read_records(written(tmp_path, kind), plan())
        assert found.rows[0] == {k: ROWS[0][k] for k in ("text", "label", "patient")}
        assert len(found.rows) == len(ROWS)
        assert found.units[:2] == ((0, 1), (2, 3))
        assert labels_of(found, "label") == LABELS

    def test_a_path_is_no_pattern(self, tmp_path):
        folder = tmp_path / "notes [2024] *"
        folder.mkdir()
        assert read_records(written(folder, "jsonl"), plan()).rows

    def test_no_copy_stays_behind_and_nobody_is_called(self, tmp_path, monkeypatch):
        asked: list[str] = []
        monkeypatch.setattr("datasets.load.increase_load_count", asked.append)
        (tmp_path / "temporary").mkdir()
        (tmp_path / "data").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        before = set(cache_files())
        path = jsonl(tmp_path / "data" / "train.jsonl", ROWS)
        read_records(path, plan())
        assert not asked
        assert set(cache_files()) == before
        assert not list((tmp_path / "temporary").iterdir())
        cache = str(tmp_path / "cache")  # the usual way: it leaves notes and asks a counter
        datasets.load_dataset("json", data_files=str(path), cache_dir=cache)
        assert asked
        arrow = next((tmp_path / "cache").rglob("*.arrow"))
        assert ROWS[0]["text"].encode() in arrow.read_bytes()

    def test_a_csv_holds_text_only(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(
            "\ufeffpatient,text,label\r\n001,NA,cardiology\r\n1,3.0,surgery\r\n".encode()
        )
        found = read_records(path, plan())
        assert [row["text"] for row in found.rows] == ["NA", "3.0"]
        assert len(found.units) == 2

    def test_a_row_without_a_patient_is_left_out_aloud(self, tmp_path, caplog):
        rows: list[dict[str, Any]] = [dict(row) for row in ROWS[:6]]
        rows[4]["patient"], rows[5]["patient"] = None, ""
        with caplog.at_level(logging.WARNING):
            found = read_records(jsonl(tmp_path / "a.jsonl", rows), plan())
        assert len(found.rows) == 4
        assert "2 rows without 'patient'" in caplog.text

    def test_without_a_unit_each_row_is_one(self, tmp_path):
        found = read_records(jsonl(tmp_path / "a.jsonl", ROWS[:3]), plan(data=Data()))
        assert found.units == ((0,), (1,), (2,))

    def test_a_template_names_the_columns(self, tmp_path):
        data = Data(template="{hospital}: {text}", unit="patient")
        found = read_records(jsonl(tmp_path / "a.jsonl", ROWS), plan(data=data))
        assert set(found.rows[0]) == {"hospital", "text", "label", "patient"}

    def test_conversations(self, tmp_path):
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        path = jsonl(tmp_path / "a.jsonl", [{"talk": talk}])
        chats = plan(task=Task(max_length=32), data=Data(messages="talk"))
        assert read_records(path, chats).rows[0]["talk"][1]["content"] == "Yes?"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(columns=tuple(rows[0]), rows=tuple(rows))


def cache_files() -> Iterable[Path]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return home.rglob("*") if home.exists() else ()


class TestErrorsNeverQuoteARecord:
    def refused(self, path: Path, given: Plan, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            read_records(path, given)
        error: BaseException | None = caught.value
        while error is not None:  # nor may what a log would print below it
            assert CANARY not in str(error)
            error = error.__cause__ or error.__context__

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"text": 3}, "row 3: column 'text' must hold text"),
            ({"text": None}, "row 3: column 'text' must hold text"),
            ({"label": CANARY}, "row 3: column 'label' must hold one of the plan's labels"),
            ({"label": 1.5}, "row 3: column 'label' must hold a label"),
            ({"patient": 1.5}, "row 3: column 'patient'"),
            ({"hospital": ""}, "row 3: column 'hospital'"),
        ],
    )
    def test_of_a_row(self, tmp_path, monkeypatch, change, match):
        rows = [row | {"text": CANARY} for row in ROWS]
        rows[2] = rows[2] | change
        monkeypatch.setattr(records, "read_table", lambda path: table(rows))
        site = Data(unit="patient", site="hospital")
        self.refused(tmp_path / "a.jsonl", plan(data=site), match)

    @pytest.mark.parametrize(
        "talk",
        [
            CANARY,
            [CANARY],
            [],
            [{"role": "user", "content": CANARY}],
            [{"role": "assistant", "content": None}],
            [{"role": "assistant"}],
        ],
    )
    def test_of_a_conversation(self, tmp_path, monkeypatch, talk):
        monkeypatch.setattr(records, "read_table", lambda path: table([{"talk": talk}]))
        chats = plan(task=Task(max_length=32), data=Data(messages="talk"))
        self.refused(tmp_path / "a.jsonl", chats, "row 1: column 'talk'")

    def test_of_a_missing_column(self, tmp_path):
        rows = [{"patient": 1, "texts": CANARY, "label": "surgery"}]
        path = jsonl(tmp_path / "a.jsonl", rows)
        self.refused(path, plan(), "no column 'text'; did you mean 'texts'")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("bad.jsonl", b'{"text": "CANARY Mrs Jane Roe"}\n{"text": CANARY Mrs Jane Roe}'),
            ("latin.jsonl", '{"text": "CANARY Mrs Jane Roe é"}'.encode("latin-1")),
            ("cut.jsonl.gz", gzip.compress(b'{"text": "CANARY Mrs Jane Roe"}', mtime=0)[:-9]),
            ("torn.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + b"\xff" * 40),
            ("plain.jsonl.gz", b'{"text": "CANARY Mrs Jane Roe"}'),
            ("ragged.csv", b"patient,text\n1,CANARY Mrs Jane Roe\n1,2,CANARY Mrs Jane Roe"),
            ("latin.csv", "text\nCANARY Mrs Jane Roe é".encode("latin-1")),
            ("bad.parquet", b"CANARY Mrs Jane Roe"),
        ],
    )
    def test_of_a_broken_file(self, tmp_path, caplog, capfd, name, content):
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path / name, plan(), "not readable as")
        assert CANARY not in caplog.text
        assert CANARY not in "".join(capfd.readouterr())

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
    def test_of_an_empty_file(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"" if name == "a.jsonl" else b"patient,text,label\n")
        self.refused(tmp_path / name, plan(), "no records")

    def test_of_a_file_that_is_not_there(self, tmp_path):
        self.refused(tmp_path / "a.jsonl", plan(), "not readable as json")
        self.refused(tmp_path / "a.xlsx", plan(), r"expected \.jsonl")


def left_out(path: Path, **sections: Any) -> list[Any]:
    """The patients that stay when those who do not fit are left out."""
    found = read_records(path, plan(**sections), leave_out=True)
    return sorted({row["patient"] for row in found.rows}, key=str)


class TestOneUnitDoesNotDecideOverAnother:
    """For every fault in one patient's rows: the others' are read as without it, and no error."""

    GOOD: ClassVar[list[dict[str, Any]]] = [
        {"patient": name, "text": f"a note {name}", "label": "surgery"} for name in "abcd"
    ]

    @pytest.mark.parametrize(
        "odd",
        [
            '{"patient": "x", "text": 3, "label": "surgery"}',
            '{"patient": "x", "text": "t", "label": "none of them"}',
            '{"patient": "x", "text": "t", "label": 1.5}',
            '{"patient": "x", "text": "t"}',
            '{"patient": "x", "text": "half a pair \\ud800", "label": "surgery"}',
            '{"patient": 2.5, "text": "t", "label": "surgery"}',
            '{"patient": {"name": "x"}, "text": "t", "label": "surgery"}',
            '{"patient": "x", "text": "torn',
            "x",
            "[" * 100000,
            '"x"',
            "null",
        ],
    )
    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_in_json_lines(self, tmp_path, odd, place):
        lines = [json.dumps(row) for row in self.GOOD]
        (tmp_path / "good.jsonl").write_text("\n".join(lines))
        lines.insert(place, odd)
        (tmp_path / "odd.jsonl").write_text("\n".join(lines))
        clean, odd_one = (
            read_records(tmp_path / name, plan(), leave_out=True)
            for name in ("good.jsonl", "odd.jsonl")
        )
        assert odd_one == clean
        assert len(clean.units) == 4
        with pytest.raises(DataError):
            read_records(tmp_path / "odd.jsonl", plan())

    @pytest.mark.parametrize(
        "odd",
        [b"x,t", b"x,t,surgery,more", b"x,t,none", b"x,\xff\xfe,surgery", b'x,"a ""q"" b",none'],
    )
    def test_in_a_table(self, tmp_path, odd):
        lines = [",".join(row.values()).encode() for row in self.GOOD]
        path = tmp_path / "odd.csv"
        path.write_bytes(b"\n".join([b"patient,text,label", *lines[:2], odd, *lines[2:]]))
        assert left_out(path) == list("abcd")
        with pytest.raises(DataError):
            read_records(path, plan())

    def test_all_rows_of_the_unit_go(self, tmp_path):
        rows = [*self.GOOD, {**self.GOOD[0], "text": None}]
        assert left_out(jsonl(tmp_path / "a.jsonl", rows)) == list("bcd")

    def test_a_row_of_nobody_takes_nobody_along(self, tmp_path):
        named = {"patient": "None", "text": "t", "label": "surgery"}
        rows: list[dict[str, Any]] = [named, {"patient": None, "text": None, "label": "surgery"}]
        assert left_out(jsonl(tmp_path / "a.jsonl", rows)) == ["None"]

    def test_one_value_changes_no_other_s_type(self, tmp_path):
        """A reader that guesses a column's type from all rows reads 1 as 1.0 beside 2.5."""
        rows = [{"patient": 1, "text": "t", "label": "surgery"}]
        rows += [{"patient": 2.5, "text": "t", "label": "surgery"}]
        path = jsonl(tmp_path / "a.jsonl", rows)
        assert left_out(path) == [1]
        guessed = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        assert guessed["patient"] == [1.0, 2.5], "control"

    def test_even_all_may_be_left_out(self, tmp_path):
        for text in ("", "x\n", '{"no": "column"}\n'):
            (tmp_path / "a.jsonl").write_text(text)
            assert left_out(tmp_path / "a.jsonl") == []
        (tmp_path / "a.csv").write_text("patient,text,label\n")
        assert left_out(tmp_path / "a.csv") == []

    def test_what_no_patient_decides_is_still_an_error(self, tmp_path):
        (tmp_path / "header.csv").write_text("patient,note,label\na,t,surgery\n")
        (tmp_path / "bad.parquet").write_text("x")
        (tmp_path / "bad.json").write_text("x")
        for name in ("header.csv", "bad.parquet", "bad.json", "none.jsonl"):
            with pytest.raises(DataError):
                left_out(tmp_path / name)


def test_a_list_of_objects_is_read_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert read_records(path, plan()) == read_records(written(tmp_path, "jsonl"), plan())


class TestSplits:
    def test_a_folder(self, tmp_path):
        for name in ("train.jsonl.gz", "test-00000-of-00001.parquet", "README.md"):
            (tmp_path / name).touch()
        found = {split: path.name for split, path in find_splits(tmp_path).items()}
        assert found == {"train": "train.jsonl.gz", "test": "test-00000-of-00001.parquet"}

    def test_a_file_is_the_training_data(self, tmp_path):
        path = jsonl(tmp_path / "notes.jsonl", ROWS)
        assert find_splits(path) == {"train": path}

    def test_refusals(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            find_splits(tmp_path / "nowhere")
        with pytest.raises(DataError, match="expected a file train"):
            find_splits(tmp_path)
        (tmp_path / "train.csv").touch()
        (tmp_path / "train.jsonl").touch()
        with pytest.raises(DataError, match="two files for train"):
            find_splits(tmp_path)


class TestSites:
    RECORDS = group(ROWS, "patient")

    def test_by_a_column(self):
        sites = make_sites(self.RECORDS, Data(unit="patient", site="hospital"))
        assert list(sites) == ["h0", "h1", "h2", "h3"]
        assert sum(len(site.rows) for site in sites.values()) == len(ROWS)
        assert all({row["hospital"] for row in s.rows} == {name} for name, s in sites.items())

    def test_nothing_makes_sites(self):
        with pytest.raises(DataError, match="makes no sites"):
            make_sites(self.RECORDS, Data())

    @given(st.floats(0.05, 50), st.integers(3, 12), st.integers(0, 9))
    def test_a_split_deals_every_unit_once_and_never_cuts_one(self, alpha, sites, seed):
        data = Data(unit="patient", split=Split(by="label", alpha=alpha, sites=sites, seed=seed))
        dealt = make_sites(self.RECORDS, data)
        assert dealt == make_sites(self.RECORDS, data)
        assert len(dealt) == sites
        patients = [{row["patient"] for row in site.rows} for site in dealt.values()]
        assert sum(map(len, patients)) == len(self.RECORDS.units)
        assert set().union(*patients) == {row["patient"] for row in ROWS}

    def test_a_small_alpha_is_more_uneven_than_a_large_one(self):
        rows = [{"patient": str(i), "label": str(i % 4)} for i in range(2000)]
        largest = {}
        for alpha in (0.1, 100.0):
            data = Data(unit="patient", split=Split(by="label", alpha=alpha, sites=5))
            dealt = make_sites(group(rows, "patient"), data)
            shares = [
                max(sum(row["label"] == label for row in site.rows) for site in dealt.values())
                for label in "0123"
            ]
            largest[alpha] = sum(shares) / 2000
        assert largest[0.1] > 0.5
        assert largest[100.0] < 0.3


class TestUnits:
    RECORDS = group(ROWS, "patient")

    def test_holding_out_keeps_patients_whole(self):
        rest, held = hold_out(self.RECORDS, 0.25, seed=1)
        assert (rest, held) == hold_out(self.RECORDS, 0.25, seed=1)
        assert len(held.units) == round(0.25 * len(self.RECORDS.units))
        patients = [{row["patient"] for row in part.rows} for part in (rest, held)]
        assert not patients[0] & patients[1]
        assert len(rest.rows) + len(held.rows) == len(ROWS)

    def test_select_and_merge_renumber_rows(self):
        first, second = select(self.RECORDS, [3, 0]), select(self.RECORDS, [5])
        both = merge([first, second])
        assert both.units == ((0, 1), (2, 3), (4, 5))
        assert [row["patient"] for row in both.rows] == ["p3", "p3", "p0", "p0", "p5", "p5"]
