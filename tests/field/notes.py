"""The hospitals' records, each with the canary, in the formats that hospitals have."""

from pathlib import Path

from datasets.utils.logging import disable_progress_bar

from fedward.client.data_sources import Columns, DataSource
from fedward.simulations.notes import generate
from fedward.tuning.records import group
from tests.client.test_safe_logs import CANARY, WRITERS
from tests.field import scene


def write_notes(folder: Path, hospital: str) -> DataSource:
    """The first patients of one hospital of the demo, each with the canary, as files have them."""
    whole = group(generate(0).train[hospital], "patient")
    rows = [
        {**whole.rows[i], "text": f"{whole.rows[i]['text']} {CANARY}",
         "patient": f"{CANARY} {whole.rows[i]['patient']}"}
        for unit in whole.units[: scene.PATIENTS]
        for i in unit
    ]  # fmt: skip
    folder.mkdir()
    disable_progress_bar()
    kind = ("jsonl", "csv", "parquet")[scene.HOSPITALS.index(hospital) % 3]
    WRITERS[kind](folder / f"notes.{kind}", rows)
    return source_of(folder / f"notes.{kind}")


def source_of(path: Path) -> DataSource:
    """How a site declares its notes."""
    columns = Columns(names={"text": "text", "label": "label"})
    return DataSource(path=str(path), unit="patient", columns=columns)
