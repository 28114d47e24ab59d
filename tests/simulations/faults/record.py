"""Records a run for later versions to read: ``python -m tests.simulations.faults.record``.

A run of two rounds over four sites. Kept are all files as they were after the first round, every
letter of that round with its answer, and the hash of the adapter after each round.
"""

import base64
import contextlib
import hashlib
import json
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flwr.app import Message, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedward.simulations.faults.hospital import Hospital
from fedward.simulations.faults.schedule import COORDINATOR, Fault, Kind
from fedward.simulations.faults.watch import Watch
from fedward.simulations.faults.world import World

RECORDED = Path(__file__).with_name("recorded.json")


def to_bytes(records: RecordDict) -> bytes:
    """A letter's records, the same for the same letter."""
    return bytes(recorddict_to_proto(records).SerializeToString(deterministic=True))


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def record() -> dict[str, Any]:
    """Run the two rounds and keep what is to be kept."""
    letters, left = list[list[str]](), Watch.left

    def kept(watch: Watch, site: Hospital, message: Message, reply: Message) -> None:
        letters.append([encode(to_bytes(m.content)) for m in (message, reply)])
        left(watch, site, message, reply)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Watch, "left", kept),
        contextlib.closing(World(Path(folder) / "world", seed=0)) as world,
    ):
        world.arm(Fault(kind=Kind.KILL, party=COORDINATOR, point="round.committed"))
        with world.at_work():
            world.go()
            first = {"letters": list(letters), "files": files(world.root)}
            world.go()
        adapters = [world.watch.blob(facts["adapter"]) for _, facts in world.watch.committed()]
    return {**first, "adapters": [hashlib.sha256(adapter).hexdigest() for adapter in adapters]}


def files(root: Path) -> dict[str, str]:
    """Every file below a folder: databases as SQL, chains as they are, others in base64."""
    found = dict[str, str]()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if path.suffix == ".sqlite":
            found[name] = dump(path)
        elif path.suffix in {".jsonl", ".toml"}:
            found[name] = path.read_text("utf-8")
        elif path.name != "life.json":
            found[name] = encode(path.read_bytes())
    return found


def dump(path: Path) -> str:
    """A database as SQL, with the number of its format."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        return "\n".join([*db.iterdump(), f"PRAGMA user_version={version};"])


def restore(kept: dict[str, str], root: Path) -> None:
    """Put recorded files in the place of those below a folder."""
    for name, text in kept.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if path.suffix == ".sqlite":
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.executescript(text)
        elif path.suffix in {".jsonl", ".toml"}:
            path.write_text(text, "utf-8")
        else:
            path.write_bytes(base64.b64decode(text))


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
