"""A planted string that is provoked into errors appears in no log, reply, journal or terminal."""

import csv
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedward.attempt import Attempt
from fedward.client.agent import Agent
from fedward.client.approval import Consent
from fedward.client.data_sources import DataSource
from fedward.client.journal import Journal, export_journal
from fedward.client.memory import SiteMemory
from fedward.client.policy import load_policy
from fedward.client.safe_logs import SafeFilter
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import add_source, site_records
from fedward.client.trainer import LocalTrainer
from fedward.client.training import Scores, TrainRequest, TrainResult
from fedward.errors import FedwardError, SiteCode
from fedward.messages import open_letter
from fedward.plan import Data, Plan, Task
from fedward.privacy.ledger import Ledger
from fedward.typed_toml import dump
from tests.client.desk import PLAN, POLICY, RUN, Desk
from tests.client.well import declare, source

CANARY = "CANARY-Mrs-Jane-Roe"
FIRST = Attempt(run=RUN, round=1)
CLASSIFY: Plan = dataclasses.replace(
    PLAN,
    task=Task(objective="classify", labels=("flu", "cold")),
    data=Data(text="text", label="label", unit="patient"),
)
GOOD = {"text": "a note", "label": "flu", "patient": "1"}


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)


Write = Callable[[Path], Any]

WRITERS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


def jsonl_of(text: str) -> Write:
    return lambda path: path.write_text(text)


def damaged(kind: str) -> Write:
    """A good file with the canary in the middle of its bytes."""

    def write(path: Path) -> None:
        WRITERS[kind](path, [GOOD] * 50)
        data = path.read_bytes()
        half = len(data) // 2
        path.write_bytes(data[:half] + CANARY.encode() + b"\x00\xff\xfe" + data[half:])

    return write


def rows_of(kind: str, **changes: Any) -> Write:
    return lambda path: WRITERS[kind](path, [GOOD, {**GOOD, **changes}])


FILES = {
    **{f"damaged.{kind}": damaged(kind) for kind in WRITERS},
    **{f"label.{kind}": rows_of(kind, label=CANARY) for kind in WRITERS},
    "column.jsonl": jsonl_of(json.dumps({CANARY: CANARY, "text": CANARY}) + "\n"),
    "value.jsonl": jsonl_of(json.dumps({**GOOD, "text": [CANARY]}) + "\n"),
    "unit.jsonl": jsonl_of(json.dumps({**GOOD, "patient": {"name": CANARY}}) + "\n"),
    "mixed.jsonl": jsonl_of(
        json.dumps({**GOOD, "patient": 1}) + "\n" + json.dumps({**GOOD, "patient": CANARY}) + "\n"
    ),
    "cut.jsonl": jsonl_of(json.dumps(GOOD) + "\n" + '{"text": "' + CANARY),
    "ragged.csv": jsonl_of(f"text,label,patient\na,flu,1\n{CANARY},{CANARY},{CANARY},{CANARY}\n"),
    "quote.csv": jsonl_of(f'text,label,patient\n"{CANARY},flu,1\n'),
    "bytes.csv": lambda path: path.write_bytes(
        b"text,label,patient\n" + CANARY.encode() + b"\xff\xfe,flu,1\n"
    ),
    "none.parquet": jsonl_of(CANARY),
}
"""Files that cannot be read, or not as the plan wants them; each holds the canary."""

HARMLESS = {"column.jsonl", "mixed.jsonl", "damaged.csv"}
"""Whose first error may name a column (the header), or that some readers take."""


class FileTrainer:
    """A trainer that reads its records when it is asked to train, as a hospital's process does."""

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def prepare(self, request: TrainRequest) -> None:
        pass

    def train(self, request: TrainRequest) -> TrainResult:
        records, _ = site_records(self.source, CLASSIFY)
        return LocalTrainer(records).train(request)

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        raise ValueError(CANARY)


class Site(Desk):
    """One whole site whose trainer reads a given file."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.path = path
        super().__init__(folder, sites=3)

    def agent(self, site: int, trainer: Any = None) -> Agent:
        folder = SiteFolder(root=self.folder / str(site))
        folder.root.mkdir(mode=0o700, parents=True)
        self.keys[site].save(folder.key)
        SiteFolder.create(folder.root, SiteConfig(name=f"site{site}"))
        policy = dataclasses.replace(POLICY, datasets=("notes",))
        folder.policy.write_text(dump(policy))
        declare(folder)
        key = self.keys[site]
        ledger = Ledger.open(folder.ledger, key, epsilon=8.0, delta=1e-5)
        memory = SiteMemory.open(folder.memory, key, ledger)
        journal = Journal(folder.journal, key)
        self.files[site] = (ledger, memory, journal)  # type: ignore[assignment]  # one more
        return Agent(
            site=site,
            identity=key,
            roster=self.roster,
            policy=policy,
            consent=Consent(load_policy(folder.policy), folder),
            ledger=ledger,
            memory=memory,
            journal=journal,
            trainer=FileTrainer(source(self.path)),
            key=bytes(32),
        )


@pytest.fixture
def safe_caplog(caplog):
    """What the site's handler writes."""
    caplog.handler.addFilter(SafeFilter())
    yield caplog
    for found in list(caplog.handler.filters):
        caplog.handler.removeFilter(found)


@pytest.mark.parametrize("name", list(FILES))
def test_no_file_makes_a_site_say_what_stands_in_it(tmp_path, safe_caplog, capfd, name):
    path = tmp_path / name
    FILES[name](path)
    assert CANARY.encode() in path.read_bytes() or name.startswith("label"), "control"
    safe_caplog.set_level(logging.DEBUG)
    site = Site(tmp_path / "sites", path)
    try:
        replies = [
            site.agents[0].answer(site.letter(action, FIRST, 0, site.task_parts()))
            for action in ("task", "evaluate")
        ]
        codes = [open_letter(reply, site.roster.key(0), "site").code for reply in replies]
        assert codes[0] in {SiteCode.DATA_UNUSABLE, SiteCode.TRAINING_FAILED}
        said = "".join(map(repr, replies)).encode()
        said += b"".join(
            bytes(value) for r in replies for value in r.config_records["letter"].values()
            if isinstance(value, bytes)
        )  # fmt: skip
        folder = SiteFolder(root=site.folder / "0")
        written = b"".join(p.read_bytes() for p in folder.root.rglob("*") if p.is_file())
        assert b"refused" in written, "control: the journal was read"
        said += written + export_journal(folder) + safe_caplog.text.encode()
        said += "".join(capfd.readouterr()).encode()
        assert CANARY.encode() not in said
    finally:
        site.close()


@pytest.mark.parametrize("name", list(FILES))
def test_adding_such_a_file_says_nothing_of_a_record(tmp_path, safe_caplog, name):
    """The command shows column names, which a header may hold; never what stands below them."""
    path = tmp_path / name
    FILES[name](path)
    folder = SiteFolder.create(tmp_path / "site", SiteConfig(name="a"))
    said = ""
    try:
        add_source(folder, "notes", DataSource(path=str(path), unit="patient"))
    except FedwardError as error:
        said = f"{error} {error.__cause__} {error.__context__}"
    if name not in HARMLESS:
        assert CANARY not in said + safe_caplog.text


def test_the_canary_does_come_out_where_nobody_keeps_it_in(caplog):
    """Control: pandas, pyarrow and Python themselves quote what they choke on."""
    with pytest.raises(ValueError, match=CANARY):
        int(CANARY)
    logging.getLogger("library").warning("cannot parse %s", CANARY)
    assert CANARY in caplog.text


def test_a_library_s_words_and_an_error_s_message_are_not_logged(safe_caplog):
    logging.getLogger("library.part").warning("cannot parse %s", CANARY)
    try:
        int(CANARY)
    except ValueError:
        logging.getLogger("fedward.client").exception("it failed")
        logging.getLogger("library").exception(CANARY)
    assert CANARY not in safe_caplog.text
    assert "a message of library.part at " in safe_caplog.text
    assert "it failed (ValueError at " in safe_caplog.text


def test_the_site_s_own_words_stay(safe_caplog):
    logging.getLogger("fedward.tuning").warning("%s: %d rows left out", "notes.csv", 3)
    assert "notes.csv: 3 rows left out" in safe_caplog.text


CRASH = """
import logging, sys, threading, warnings
logging.basicConfig(level=logging.DEBUG)
if sys.argv[1] == "safe":
    from fedward.client.safe_logs import keep_records_out_of_logs
    keep_records_out_of_logs()
note = sys.argv[2]
def fail():
    patient = note
    raise ValueError("cannot read " + patient)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
warnings.warn("odd value " + note)
logging.getLogger("library").error("does not format: %d", note)
class Dying:
    def __del__(self):
        raise ValueError(note)
Dying()
fail()
"""


@pytest.mark.parametrize(("mode", "shown"), [("safe", False), ("plain", True)])
def test_a_process_that_crashes_shows_where_and_not_what(mode, shown):
    done = subprocess.run(
        [sys.executable, "-c", CRASH, mode, CANARY], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert (CANARY in done.stdout + done.stderr) is shown
    assert done.stderr.count("ValueError") >= 3
    assert "in fail" in done.stderr


def test_every_site_command_is_safe(tmp_path):
    """The real program: an error that nobody foresaw ends it without its message."""
    code = (
        "import sys; from fedward.client import site_folder\n"
        f"def fail(root): raise KeyError({CANARY!r})\n"
        "site_folder.SiteFolder.load = fail\n"
        "sys.argv = ['fedward', 'site', 'approve']\n"
        "from fedward.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert CANARY not in done.stdout + done.stderr.replace(code, "")
    assert "KeyError (its message may quote a record" in done.stderr
