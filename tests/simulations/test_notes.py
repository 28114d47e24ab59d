"""The world of the demo: frozen, balanced enough, not trivial, and split by patient."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence

import pytest

from fedward.simulations.notes import (
    HOSPITALS,
    SERVICES,
    Row,
    World,
    generate,
    public_corpus,
    vocabulary,
    write_folder,
)

WORDS = re.compile(r"\w+|[^\w\s]")


@pytest.fixture(scope="module")
def world():
    return generate(0)


def rows_of(world: World) -> list[Row]:
    return [*world.test, *(row for rows in world.train.values() for row in rows)]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def test_the_generator_is_frozen(world):
    # Recorded figures hold for these very texts: a new digest asks for new figures.
    assert digest([dict(world.train), list(world.test)]) == "9d44f6c3aaaabd87"
    assert digest(public_corpus(0)) == "94a5aa47ab7ece26"


def test_another_seed_gives_other_notes(world):
    assert not {row["text"] for row in generate(1).test} >= {row["text"] for row in world.test}


def test_every_hospital_has_300_patients_and_every_class_at_5_percent(world):
    assert set(world.train) == set(HOSPITALS)
    for rows in world.train.values():
        notes = Counter(row["patient"] for row in rows)
        assert len(notes) >= 300
        assert set(notes.values()) == {2, 3, 4, 5}
        shares = Counter(row["label"] for row in rows)
        assert all(shares[service] >= 0.05 * len(rows) for service in SERVICES)


def test_hospitals_differ_in_size_case_mix_and_length(world):
    def shares(rows: Sequence[Row]) -> list[float]:
        counts = Counter(row["label"] for row in rows)
        return [counts[service] / len(rows) for service in SERVICES]

    def length(rows: Sequence[Row]) -> float:
        return sum(len(WORDS.findall(row["text"])) for row in rows) / len(rows)

    parts = list(world.train.values())
    for i, one in enumerate(parts):
        for two in parts[i + 1 :]:
            assert sum(abs(a - b) for a, b in zip(shares(one), shares(two), strict=True)) > 0.15
    assert len({len(rows) for rows in parts}) == len(parts)
    assert max(map(length, parts)) > 2 * min(map(length, parts))


def test_no_patient_is_in_both_parts(world):
    train = {row["patient"] for rows in world.train.values() for row in rows}
    assert not train & {row["patient"] for row in world.test}
    assert {row["hospital"] for row in world.test} == set(HOSPITALS)


def test_notes_are_short(world):
    assert max(len(WORDS.findall(row["text"])) for row in rows_of(world)) <= 48


def test_the_vocabulary_holds_every_word_of_notes_and_public_text(world):
    known = {word for text in vocabulary() for word in WORDS.findall(text.lower())}
    used = {
        word
        for row in [*rows_of(world), *public_corpus(3)]
        for word in WORDS.findall(row["text"].lower())
    }
    assert used <= known
    assert "zebra" not in known


def test_public_text_carries_no_hospital_and_every_label():
    corpus = public_corpus(0, 600)
    assert len(corpus) == 600
    assert {frozenset(row) for row in corpus} == {frozenset(("text", "label"))}
    assert {row["label"] for row in corpus} == set(SERVICES)


def test_a_folder_gives_the_same_rows_back(world, tmp_path):
    write_folder(world, tmp_path / "data")
    lines = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(world.test)
    train = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert len(train) == sum(map(len, world.train.values()))
