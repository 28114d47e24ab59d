"""Every byte that crosses: nothing of one site's update, size or loss is in it, in the clear.

The update is large enough for tests of uniformity: 200 kB of masked words a site.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedward.aggregation.fixed_point import clip_update
from fedward.aggregation.masks import Words
from fedward.aggregation.packing import pack
from fedward.aggregation.planned import planned_session
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.messages import open_letter, parts_of
from fedward.plan import Metrics, Plan, Tuner
from fedward.privacy.noise import SecureStream
from fedward.server.store import Phase
from fedward.simulations.federation import RUN, Federation
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny

WIDE = Tuner(arguments={"r": 48, "lora_alpha": 4, "target_modules": "all-linear"})
ROUNDS = tiny.make_rounds(count=1, steps=2, optimizer="sgd", learning_rate=1.0)
"""AdamW's first steps have one size everywhere; these have as many sizes as coordinates."""
FIRST = Attempt(run=RUN, round=1)
SITES = {"a": 2, "b": 3, "c": 40}
"""Patients of each hospital: sites of very different size."""


@dataclasses.dataclass(frozen=True)
class Wire:
    """One round, and everything that crossed between coordinator and sites in it."""

    plan: Plan
    federation: Federation
    trainers: dict[str, tiny.Recorder]
    messages: list[Message]
    folder: Path

    def sent_by(self, site: int, kind: str | None = None) -> list[RecordDict]:
        """Contents of a site's replies, in order."""
        node = self.federation.nodes[site]
        return [
            message.content
            for message in self.messages
            if message.metadata.src_node_id == node
            and kind in (None, message.metadata.message_type)
        ]

    def bytes_of(self, site: int) -> bytes:
        """Everything that one site sent."""
        return b"".join(map(raw, self.sent_by(site)))

    def masked(self, site: int) -> bytes:
        """The masked vector of a site, as bytes."""
        (content,) = self.sent_by(site, "train.masked")
        return parts_of(content)["words"]

    def words(self, site: int) -> Words:
        """The words that a site masked, made again from its fixed keys."""
        name = self.federation.names[site]
        update = self.trainers[name].results[-1].update
        tuned = tuned_model(self.plan)
        parameters = planned_session(
            self.plan,
            self.federation.roster,
            FIRST,
            task_hash=task_hash(tuned.start, self.plan.hash(), "fedavg"),
            dimension=len(update),
        )
        labels = ("rounding", RUN, "1/1/0", parameters.task_hash)
        stream = SecureStream(tiny.key(name)).child(*labels)
        clipped = clip_update(update, self.plan.aggregation.update_clip)
        return pack(clipped, self.trainers[name].results[-1].slots, parameters, stream)


def raw(content: RecordDict) -> bytes:
    """The bytes of a message's records: names, arrays and byte strings."""
    arrays = [
        name.encode() + bytes(array.data)
        for record in content.array_records.values()
        for name, array in record.items()
    ]
    values = [
        f"{key}{value if not isinstance(value, bytes) else ''}".encode()
        + (value if isinstance(value, bytes) else b"")
        for record in content.config_records.values()
        for key, value in record.items()
    ]
    metrics = [repr(dict(record)).encode() for record in content.metric_records.values()]
    return b"".join(arrays + values + metrics)


def run_once(
    folder: Path, base: Path, sites: dict[str, int] | None = None, **sections: Any
) -> Wire:
    """One round of three sites, watched."""
    plan = tiny.make_plan(base, tuner=WIDE, rounds=ROUNDS, **sections)
    counts = SITES if sites is None else sites
    records = {name: tiny.make_records(name, patients, 1) for name, patients in counts.items()}
    trainers, messages = tiny.recorders(records), list[Message]()
    federation = tiny.make_federation(folder, plan, trainers, watch=messages.append)
    federation.run()
    return Wire(plan, federation, trainers, messages, folder)


@pytest.fixture(scope="module")
def wire(tmp_path_factory, base):
    return run_once(tmp_path_factory.mktemp("wire"), base)


@pytest.fixture(scope="module")
def again(tmp_path_factory, base):
    """The same sites, records and keys once more."""
    return run_once(tmp_path_factory.mktemp("again"), base)


def test_the_words_are_the_ones_that_were_masked(wire):
    """Control of everything below: their sum is the sum that the coordinator has."""
    (_, facts) = tiny.facts_of(wire.folder, Phase.COMMITTED)[0]
    total = tiny.words_of(tiny.blob(wire.folder, facts["sum"]))
    assert np.array_equal(total, sum(wire.words(site) for site in range(3)))


@pytest.mark.parametrize("site", range(3))
def test_masked_words_look_like_noise(wire, site):
    data = wire.masked(site)
    assert len(data) >= 200_000
    assert tiny.looks_uniform(data)
    assert not tiny.looks_uniform(wire.words(site).tobytes()), "negative control: not masked"
    assert tiny.chi_square(wire.words(site).tobytes()) > 100 * tiny.chi_square(data)


def test_two_runs_with_the_same_data_have_nothing_in_common(wire, again):
    for site in range(3):
        assert np.array_equal(wire.words(site), again.words(site)), "the very same update"
        one, two = (np.frombuffer(w.masked(site), dtype=np.uint32) for w in (wire, again))
        assert tiny.looks_uniform((one - two).tobytes())
        assert not tiny.looks_uniform((one - one).tobytes()), "negative control: one mask, twice"


def test_two_sites_of_one_run_have_nothing_in_common(wire):
    first, second = (np.frombuffer(wire.masked(s), dtype=np.uint32) for s in (0, 1))
    assert tiny.looks_uniform((first - second).tobytes())
    assert tiny.looks_uniform((first + second).tobytes())


def windows(data: bytes, size: int) -> set[bytes]:
    """Every piece of ``size`` bytes that lies in the data, at any place."""
    return {data[i : i + size] for i in range(len(data) - size + 1)}


def planted(wire: Wire, site: int) -> set[bytes]:
    """Eight bytes of many coordinates: of the update, clipped, as floats of both sizes, as words.

    Two neighbouring coordinates are looked for together, so that chance finds none.
    """
    update = wire.trainers[wire.federation.names[site]].results[-1].update
    clipped = clip_update(update, wire.plan.aggregation.update_clip)
    forms = [update, clipped, wire.words(site)]
    forms += [form.astype(form.dtype.newbyteorder(">")) for form in forms]
    pieces = {form[i : i + 2].tobytes() for form in forms for i in range(0, len(form) - 1, 97)}
    double = clipped.astype(np.float64)
    pieces |= {double[i : i + 1].tobytes() for i in range(0, len(double), 97)}
    return {piece for piece in pieces if len(set(piece)) > 3}  # runs of zeros are everywhere


@pytest.mark.parametrize("site", range(3))
def test_no_coordinate_of_an_update_crosses(wire, site):
    pieces = planted(wire, site)
    assert len(pieces) > 3000
    sent = wire.bytes_of(site)
    assert not pieces & windows(sent, 8)
    leaked = sent + wire.words(site)[970:1000].tobytes()
    assert pieces & windows(leaked, 8), "negative control: ten words that were not masked"


def test_a_reply_has_the_parts_that_the_protocol_names_and_no_others(wire):
    """No sample count, no loss, no metric: there is no place for one."""
    parts = {
        "train": set(),
        "train.hello": {"message"},
        "train.shares": {"message"},
        "train.masked": {"message", "words"},
        "train.consistency": {"message"},
        "train.unmask": {"message"},
    }
    for site in range(3):
        key = wire.federation.roster.key(site)
        for kind, expected in parts.items():
            (content,) = wire.sent_by(site, kind)
            assert set(content) <= {"letter", "parts"}
            arrays = set(content.array_records.get("parts", ()))
            small = {f"part.{name}" for name in expected - arrays}
            assert set(content["letter"]) == {"header", "signature"} | small
            assert not content.metric_records
            letter = open_letter(content, key, "site")
            assert set(letter.parts) == expected
            fields = json.loads(letter.header())
            assert set(fields) == {
                "action",
                "code",
                "lines",
                "order",
                "parts",
                "receipt",
                "run",
                "site",
            }
            assert fields["receipt"] is None  # only the coordinator gives one
            assert len(fields["lines"]) <= 2


def test_sizes_do_not_tell_a_sites_size(wire):
    """Two, three and forty patients: each message has one length, whoever sends it."""
    for kind in {message.metadata.message_type for message in wire.messages}:
        lengths = {len(raw(wire.sent_by(site, kind)[0])) for site in range(3)}
        assert len(lengths) == 1, kind


def test_sizes_do_not_tell_what_the_data_are(wire, tmp_path, base):
    other = run_once(tmp_path, base, sites={"a": 30, "b": 1, "c": 5})
    sizes = [[len(raw(content)) for content in one.sent_by(0)] for one in (wire, other)]
    assert sizes[0] == sizes[1]


def test_what_a_reply_says_about_itself_is_the_same_for_every_site(wire):
    """Flower's own fields: no time of training, no reason, no error text."""
    for message in wire.messages:
        assert not message.has_error()
        assert message.metadata.group_id == "1"


def test_metrics_cross_inside_the_sum_only(tmp_path, base):
    """Slots are the last words of the masked vector; the coordinator sees their noised sum."""
    metrics = Metrics(epsilon=2.0, loss_bound=4.0)
    wire = run_once(tmp_path, base, metrics=metrics)
    ((_, facts),) = tiny.facts_of(tmp_path, Phase.COMMITTED)
    results = [trainer.results[-1].slots for trainer in wire.trainers.values()]
    total = np.sum(results, axis=0)
    found = [facts["slots"][name] for name in ("loss", "correct", "units")]
    step = 3 * (1 << 20) / ((1 << 29) - 1)
    assert np.abs(np.array(found) - total).max() <= step
    assert np.abs(np.array(found) - total + results[0]).max() > 10 * step, "negative control"
    for site, slots in enumerate(results):
        assert len(wire.masked(site)) == 4 * (len(wire.trainers["a"].results[-1].update) + 3)
        pieces = {slots[i : i + 1].tobytes() for i in range(3)}
        pieces |= {repr(value).encode() for value in slots.tolist()}
        sent = wire.bytes_of(site)
        assert not any(piece in sent for piece in pieces)


def test_metrics_are_charged_in_the_ledger(tmp_path, base):
    metrics = Metrics(epsilon=2.0)
    spent = {}
    for name, asked in (("with", metrics), ("without", None)):
        wire = run_once(tmp_path / name, base, metrics=asked)
        run, *_ = tiny.ledger_entries(tmp_path / name, 0)
        assert len(run["events"]) == (2 if asked else 1)
        spent[name] = wire.federation.epsilon_spent("a")
    assert spent["without"] < spent["with"] <= wire.plan.privacy.epsilon + metrics.epsilon


def test_without_metrics_there_is_no_slot(wire):
    ((_, facts),) = tiny.facts_of(wire.folder, Phase.COMMITTED)
    assert set(facts) == {"adapter", "cohort", "sum", "transcript"}
    assert len(wire.masked(0)) == 4 * len(wire.trainers["a"].results[-1].update)


def test_naked_runs_are_masked_all_the_same(tmp_path, base):
    """Without differential privacy the updates are the data's own: the masks must hold alone."""
    wire = run_once(tmp_path, base, privacy=tiny.NAKED)
    for site in range(3):
        assert tiny.looks_uniform(wire.masked(site))
        assert not planted(wire, site) & windows(wire.bytes_of(site), 8)
