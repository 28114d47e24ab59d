"""Synthetic clinical notes of four hospitals, and the public text that the base model reads.

Nobody in them exists. A note names one active problem, whose service is the label, beside old
problems, relatives' problems, problems ruled out and drugs. Only the words around a term tell which
one counts, and each hospital has its own words, abbreviations, length and case mix. A few notes
leave the problem unnamed and a few carry another service's label, so 1.0 is out of reach. Public
text speaks of the same terms in a textbook's words, with some labels wrong: who learns from it
knows the terms, but not how a hospital writes.

The generator is frozen: recorded figures depend on every word. Every draw is a plain uniform number
of PCG64, whose stream NumPy keeps stable, so a seed gives the same bytes everywhere.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

T = TypeVar("T")
Row: TypeAlias = dict[str, str]
Term: TypeAlias = Sequence[str]
"""A term's forms: plain, formal, short."""

_LEXICON = tomllib.loads(
    resources.files("fedward.simulations").joinpath("lexicon.toml").read_text(encoding="utf-8")
)
SERVICES = tuple(name for name in _LEXICON if name != "shared")
"""The six classes."""

HELD_OUT = 0.2
"""Share of each hospital's patients whose notes are the test set."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How somebody writes.

    Args:
        forms: Probability of a term's plain, formal and short form.
        openings: How texts begin; ``{age}``, ``{who}`` and ``{sex}`` are filled in.
        phrases: For each role a term can have in a text, its phrasings.
        ordered: Whether the roles keep the order given here; otherwise they are shuffled.
    """

    forms: Sequence[float]
    openings: Sequence[str]
    phrases: Mapping[str, Sequence[str]]
    ordered: bool = False


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """One hospital.

    Args:
        patients: How many, training and held-out together.
        mix: Share of each service among the patients' main problems, in the order of SERVICES.
        style: How its notes are written.
    """

    patients: int
    mix: Sequence[float]
    style: Style


HOSPITALS: Mapping[str, Hospital] = {
    "northgate": Hospital(
        patients=900,
        mix=(0.32, 0.24, 0.14, 0.12, 0.10, 0.08),
        style=Style(
            forms=(0.0, 0.2, 0.8),
            openings=("AGE {age} SEX {sex}.",),
            phrases={
                "problem": ("DX: {}.", "A/P: {}.", "PRIMARY: {}."),
                "symptom": ("CC: {}.", "HPI: {}."),
                "past": ("PMH: {}.", "HX OF {}."),
                "family": ("FHX: {}.", "FAMILY: {}."),
                "absent": ("R/O: {} NEGATIVE.", "NO {}."),
                "drug": ("RX: {}.", "MEDS: {}."),
            },
        ),
    ),
    "harbour": Hospital(
        patients=750,
        mix=(0.10, 0.08, 0.30, 0.26, 0.14, 0.12),
        style=Style(
            forms=(0.3, 0.7, 0.0),
            openings=("A {age} year old {who}.", "This {who} is {age}."),
            phrases={
                "symptom": ("There was {} today.", "The patient reports {}."),
                "past": ("There is longstanding {}.", "Our patient lives with {}."),
                "family": ("A parent died of {}.", "A sister had {}."),
                "problem": ("We are treating {}.", "The findings fit {}.", "This visit is for {}."),
                "absent": ("We saw no {}.", "The patient denies {}."),
                "drug": ("We gave {}.", "The patient takes {}."),
            },
            ordered=True,
        ),
    ),
    "valley": Hospital(
        patients=600,
        mix=(0.12, 0.14, 0.08, 0.10, 0.30, 0.26),
        style=Style(
            forms=(0.0, 0.1, 0.9),
            openings=("{age} {sex}",),
            phrases={
                "problem": ("imp {}", "-> {}", "here w {}"),
                "symptom": ("c/o {}", "{} x3d"),
                "past": ("h/o {}", "known {}"),
                "family": ("fh {}", "mo + fa {}"),
                "absent": ("neg {}", "denies {}"),
                "drug": ("tx {}", "on {}"),
            },
        ),
    ),
    "summit": Hospital(
        patients=500,
        mix=(0.16, 0.26, 0.12, 0.26, 0.12, 0.08),
        style=Style(
            forms=(0.5, 0.4, 0.1),
            openings=("Dear doctor, your {who}, {age}.", "Dear colleague, {who} aged {age}."),
            phrases={
                "problem": ("Main concern: {}.", "I believe we face {}.", "Working label {}."),
                "drug": ("Please continue {}.", "I suggest {}."),
                "past": ("Background of {}.", "Previously {}, now quiet."),
                "symptom": ("Troubled by {}.", "Complaint is {}."),
                "absent": ("Happily {} was excluded.", "Nothing suggests {}."),
                "family": ("Several relatives had {}.", "A brother has {}."),
            },
            ordered=True,
        ),
    ),
}
"""The four hospitals, largest first."""

_TEXTBOOK = Style(
    forms=(1 / 3, 1 / 3, 1 / 3),
    openings=("",),
    phrases={
        "problem": (
            "The diagnosis is {}.",
            "This case illustrates {}.",
            "Diagnosis: {}.",
            "Primary problem: {}.",
            "The concern is {}.",
            "He is treated for {}.",
            "Findings of {}.",
        ),
        "symptom": ("A typical sign is {}.", "She complains of {}.", "Symptom: {}."),
        "past": ("History of {}.", "Earlier {} is common.", "Longstanding {}.", "Past {}."),
        "family": ("Family history of {}.", "Family: {}.", "{} in relatives.", "Mother had {}."),
        "absent": ("There is no {}.", "Tests exclude {}.", "It is not {}.", "{} negative."),
        "drug": ("Treatment is {}.", "Doctors prescribe {}.", "Drugs: {}."),
    },
)
_LESSONS = (
    "{0[0]}, also known as {0[1]} or {0[2]}, is a disorder of the {organ}.",
    "In {0[1]} ({0[2]}) the usual sign is {symptom[0]}.",
    "{drug[1]} is given for {0[0]}, a disease of the {organ}.",
    "The {organ} may be harmed by {0[1]}, which brings {symptom[1]}.",
    "{symptom[1]} points to {0[2]}; {drug[0]} ({drug[2]}) helps.",
)


@dataclass(frozen=True, kw_only=True)
class World:
    """The notes of all hospitals; no patient is in both parts.

    Args:
        train: Hospital name to its rows of ``patient``, ``hospital``, ``text`` and ``label``.
        test: Such rows of every hospital's held-out patients.
    """

    train: Mapping[str, Sequence[Row]]
    test: Sequence[Row]


class _Draw:
    """Choices made from plain uniform numbers."""

    def __init__(self, *path: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(path))

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        point = self._generator.random()
        if weights is None:
            return options[int(point * len(options))]
        return options[int(np.searchsorted(np.cumsum(weights[:-1]), point, side="right"))]

    def other(self, service: str) -> str:
        return self.pick([name for name in SERVICES if name != service])

    def term(self, service: str, kind: str) -> Term:
        terms: Sequence[Term] = _LEXICON[service][kind]
        return self.pick(terms)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self._generator.random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def _symptom(draw: _Draw, service: str) -> Term:
    """A symptom of the service, half the time one that several services share."""
    return draw.term("shared" if draw.chance(0.5) else service, "symptoms")


def _facts(draw: _Draw, service: str, comorbid: str) -> dict[str, Term]:
    """What one text says: role to term."""
    facts = {"problem": draw.term(service, "conditions")} if draw.chance(0.95) else {}
    facts["symptom"] = _symptom(draw, service if draw.chance(0.8) else draw.other(service))
    if draw.chance(0.7):
        facts["past"] = draw.term(comorbid, "conditions")
    if draw.chance(0.5):
        facts["family"] = draw.term(
            comorbid if draw.chance(0.3) else draw.other(service), "conditions"
        )
    if draw.chance(0.5):
        facts["absent"] = draw.term(draw.other(service), "conditions")
    if draw.chance(0.5):
        facts["drug"] = draw.term(service if draw.chance(0.6) else comorbid, "drugs")
    return facts


def _write(
    draw: _Draw, style: Style, facts: Mapping[str, Term], age: int = 0, sex: str = "m"
) -> str:
    who = {"m": "gentleman", "f": "lady"}[sex]
    parts = [draw.pick(style.openings).format(age=age, who=who, sex=sex)]
    roles = [role for role in style.phrases if role in facts]
    parts += [
        draw.pick(style.phrases[role]).format(draw.pick(facts[role], style.forms))
        for role in (roles if style.ordered else draw.shuffled(roles))
    ]
    return " ".join(parts).strip()


def _patient(draw: _Draw, patient: str, name: str) -> list[Row]:
    """Two to five notes of one patient: three of four are about the main problem's service."""
    hospital = HOSPITALS[name]
    age, sex = draw.pick(range(30, 90)), draw.pick(("m", "f"))
    main = draw.pick(SERVICES, hospital.mix)
    comorbid = draw.other(main)
    rows = []
    for _ in range(draw.pick(range(2, 6))):
        service, other = (main, comorbid) if draw.chance(0.75) else (comorbid, main)
        text = _write(draw, hospital.style, _facts(draw, service, other), age, sex)
        label = service if draw.chance(0.98) else other
        rows.append({"patient": patient, "hospital": name, "text": text, "label": label})
    return rows


def generate(seed: int) -> World:
    """Write the notes of every hospital.

    Args:
        seed: 0 or more; equal seeds give equal worlds on every machine.
    """
    train: dict[str, list[Row]] = {name: [] for name in HOSPITALS}
    test: list[Row] = []
    for number, (name, hospital) in enumerate(HOSPITALS.items()):
        for index in range(hospital.patients):
            rows = _patient(_Draw(seed, number, index), f"{name}-{index:04}", name)
            held_out = index < HELD_OUT * hospital.patients
            (test if held_out else train[name]).extend(rows)
    return World(train=train, test=test)


def public_corpus(seed: int, rows: int = 12000) -> list[Row]:
    """Write textbook text: case sketches, one lesson in five, and one label in ten drawn at random.

    Args:
        seed: 0 or more.
        rows: How many.

    Returns:
        Rows of ``text`` and ``label``.
    """
    draw = _Draw(seed, len(HOSPITALS))
    corpus = []
    for _ in range(rows):
        service = draw.pick(SERVICES)
        if draw.chance(0.2):
            text = draw.pick(_LESSONS).format(
                draw.term(service, "conditions"),
                organ=_LEXICON[service]["organ"],
                symptom=_symptom(draw, service),
                drug=draw.term(service, "drugs"),
            )
        else:
            text = _write(draw, _TEXTBOOK, _facts(draw, service, draw.other(service)))
        label = draw.pick(SERVICES) if draw.chance(0.1) else service
        corpus.append({"text": text, "label": label})
    return corpus


def vocabulary() -> list[str]:
    """Every word that a text can hold, as short texts to build a tokenizer from.

    Taken from the public phrase book and lexicon, never from a note.
    """
    texts = [*_LESSONS, *(str(age) for age in range(30, 90)), "gentleman lady m f"]
    for style in (_TEXTBOOK, *(hospital.style for hospital in HOSPITALS.values())):
        texts += [*style.openings, *(text for role in style.phrases.values() for text in role)]
    for section in _LEXICON.values():
        kinds = [section.get(kind, ()) for kind in ("conditions", "symptoms", "drugs")]
        texts += [section.get("organ", ""), *(form for kind in kinds for t in kind for form in t)]
    return [re.sub(r"{[^}]*}", " ", text) for text in texts]


def write_folder(world: World, folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``, as ``--data`` reads them.

    Args:
        world: The notes.
        folder: Made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pooled = [row for rows in world.train.values() for row in rows]
    for name, rows in (("train", pooled), ("test", world.test)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
