"""What an earlier version wrote and sent is read, checked and gone on with, byte for byte."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedward.aggregation.planned import planned_session
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import task_hash
from fedward.client.journal import verify_journal
from fedward.errors import FedwardError
from fedward.messages import SESSION_ACTIONS, Letter, open_letter, seal_letter
from fedward.plan import from_json
from fedward.privacy.ledger import read_books
from fedward.simulations.faults import ground
from fedward.simulations.faults.world import World
from fedward.tuning.vector import dimension, layout_from_bytes
from tests.simulations.faults.record import RECORDED, restore, to_bytes

KEPT = json.loads(RECORDED.read_text("utf-8"))


def from_text(text: str) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(base64.b64decode(text)))


def letters() -> list[tuple[Letter, Letter]]:
    """Every letter of the round, with its answer."""
    return [
        (
            open_letter(from_text(asked), ground.ROSTER.coordinator, "coordinator"),
            open_letter(from_text(answered), ground.SITE_KEYS[number % 4].public_key, "site"),
        )
        for number, (asked, answered) in enumerate(in_order())
    ]


def in_order() -> list[list[str]]:
    """By exchange and site."""

    def place(pair: list[str]) -> tuple[int, int]:
        header = json.loads(from_text(pair[0]).config_records["letter"]["header"])  # type: ignore[arg-type]
        return ("task", *SESSION_ACTIONS).index(header["action"]), header["site"]

    return sorted(KEPT["letters"], key=place)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """The world as it was recorded, after the first of two rounds."""
    with contextlib.closing(World(tmp_path / "world", seed=0)) as world:
        restore(KEPT["files"], world.root)
        yield world


def test_every_letter_is_sealed_alike_today():
    found = letters()
    assert len(found) == ground.PLAN.cohort.minimum * 6 + 6
    for (asked, answered), texts in zip(found, in_order(), strict=True):
        again = (
            seal_letter(asked, ground.COORDINATOR_KEY, "coordinator"),
            seal_letter(answered, ground.SITE_KEYS[answered.site], "site"),
        )
        assert [to_bytes(records) for records in again] == [base64.b64decode(t) for t in texts]


def test_the_session_gives_the_same_requests_and_the_same_sum_today(world):
    by_action = {
        action: dict[int, tuple[Letter, Letter]]() for action in ("task", *SESSION_ACTIONS)
    }
    for asked, answered in letters():
        by_action[asked.action][asked.site] = asked, answered
    task = by_action["task"][0][0]
    plan, layout = from_json(task.part("plan")), layout_from_bytes(task.part("layout"))
    hashed = task_hash(task.part("adapter"), plan.hash(), plan.aggregation.scheme)
    parameters = planned_session(
        plan, ground.ROSTER, task.attempt, task_hash=hashed, dimension=dimension(layout)
    )
    tally = Tally(parameters=parameters, roster=ground.ROSTER)
    todo = dict.fromkeys(range(4), tally.request())
    for action in SESSION_ACTIONS:
        exchange = by_action[action]
        assert {site: asked.part("message") for site, (asked, _) in exchange.items()} == todo
        for site, (_, answered) in exchange.items():
            message, add = answered.part("message"), getattr(tally, f"add_{action}")
            if action == "masked":
                add(site, message, np.frombuffer(answered.part("words"), parameters.grid.dtype))
            else:
                add(site, message)
        if action != "unmask":
            close = {"hello": "hellos"}.get(action, action)
            todo = getattr(tally, f"close_{close}")()
    ((_, facts),) = world.watch.committed()
    result = tally.result()
    assert result.words.tobytes() == world.watch.blob(facts["sum"])
    assert (list(result.cohort), result.transcript.hex()) == (facts["cohort"], facts["transcript"])


def test_ledgers_and_journals_hold_and_say_the_same(world):
    for site in world.sites:
        key, policy = ground.ROSTER.key(site.number), ground.POLICY
        assert verify_journal(site.folder, key)
        ledger = site.folder.ledger
        books = read_books(ledger, key, epsilon=policy.max_epsilon, delta=policy.delta)
        assert (books.runs, books.spent(ground.RUN), books.remaining(ground.RUN)) == (
            (ground.RUN,), 1, 3,
        )  # fmt: skip


def test_the_run_goes_on_to_the_recorded_adapter(world):
    world.run()
    assert str(world.watch.run_state()) == "finished"
    committed = world.watch.committed()
    assert [attempt.order for attempt, _ in committed] == [(1, 1, 1), (2, 1, 1)]
    adapters = [world.watch.blob(facts["adapter"]) for _, facts in committed]
    assert [hashlib.sha256(data).hexdigest() for data in adapters] == KEPT["adapters"]


@pytest.mark.parametrize("name", ["site-0/ledger.jsonl", "site-0/journal.jsonl"])
def test_a_recorded_file_that_was_changed_is_refused(tmp_path, name):
    """Negative control: the bytes do count."""
    kept: dict[str, Any] = {
        **KEPT["files"],
        name: KEPT["files"][name].replace('"seq":1', '"seq":3'),
    }
    with contextlib.closing(World(tmp_path / "world", seed=0)) as world:
        restore(kept, world.root)
        with pytest.raises(FedwardError, match="line 2"):
            world.sites[0].start()
