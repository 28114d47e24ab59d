"""Tiny hospitals, a tiny Llama and plans over them: whole federations in a second or two."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedward.aggregation.masks import Words
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client import trainer as trainer_module
from fedward.client.trainer import LocalTrainer
from fedward.client.training import Scores, Trainer, TrainRequest, TrainResult
from fedward.plan import Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.server.sessions import Observer
from fedward.server.store import Event, Phase, RunStore
from fedward.simulations.federation import RUN, Federation
from fedward.tuning.adapter import flatten, from_bytes, load_adapter
from fedward.tuning.models import fingerprint
from fedward.tuning.objectives import encode
from fedward.tuning.records import Records, group
from fedward.tuning.small import build_llama, build_tokenizer
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import Vector

LABELS = ("heart", "lung")
NOBODY = Records(rows=(), units=())
_TEXTS = {
    "heart": "chest pain and a fast pulse after stairs",
    "lung": "dry cough and short breath since Monday",
}


def make_rows(hospital: str, patients: int, notes: int = 2) -> list[dict[str, str]]:
    """The notes of one hospital; patients alternate between the classes."""
    return [
        {
            "patient": f"{hospital}-{patient}",
            "text": f"{_TEXTS[LABELS[patient % 2]]} {note} {hospital}",
            "label": LABELS[patient % 2],
            "hospital": hospital,
        }
        for patient in range(patients)
        for note in range(notes)
    ]


def make_records(hospital: str, patients: int, notes: int = 2) -> Records:
    """:func:`make_rows` as records."""
    return group(make_rows(hospital, patients, notes), "patient")


def make_sites(count: int = 4, patients: int = 4) -> dict[str, Records]:
    """Hospitals ``a``, ``b``, ...: each has one patient more than the one before."""
    names = [chr(ord("a") + number) for number in range(count)]
    return {name: make_records(name, patients + place) for place, name in enumerate(names)}


def write_data(folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "train") -> Path:
    """Write rows as one split of a data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def build_base(folder: Path) -> Path:
    """A Llama of one layer in a folder; made once."""
    if not folder.exists():
        texts = [text for text in _TEXTS.values() for _ in range(4)]
        build_llama(folder, build_tokenizer(texts, 300), layers=1, heads=2, max_length=32)
    return folder


def make_plan(base: Path, **sections: Any) -> Plan:
    """A frozen plan over the tiny Llama; every section can be replaced."""
    given: dict[str, Any] = {
        "name": "tiny",
        "model": Model(path=str(base), sha256=fingerprint(base)),
        "tuner": Tuner(arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}),
        "task": Task(objective="classify", labels=LABELS, max_length=16),
        "data": Data(unit="patient", site="hospital"),
        "rounds": make_rounds(),
        "privacy": Privacy(epsilon=8.0, delta=1e-5, clip=0.5, records_per_unit=2),
        "cohort": Cohort(minimum=3, colluders=1),
        "aggregation": Aggregation(scheme="fedavg"),
    }
    return Plan(**(given | sections))


def make_rounds(**changes: Any) -> Rounds:
    """Two rounds of one step over every patient: at this rate the noise is found at once."""
    given: dict[str, Any] = {
        "count": 2,
        "spare": 1,
        "steps": 1,
        "sampling_rate": 1.0,
        "normaliser": 4.0,
        "learning_rate": 1e-2,
        "deadline": "60s",
    }
    return Rounds(**(given | changes))


def make_request(plan: Plan, number: int = 1, **changes: Any) -> TrainRequest:
    """What an agent asks its trainer for, in the first session of a round of run ``r``."""
    tuned = tuned_model(plan)
    given: dict[str, Any] = {
        "plan": plan,
        "attempt": Attempt(run="r", round=number),
        "draw": 0,
        "adapter": tuned.start,
        "layout": tuned.layout,
    }
    return TrainRequest(**(given | changes))


def trained(
    plan: Plan, step: Mechanism, *, steps: int, records: Records = NOBODY, **options: Any
) -> Vector:
    """What steps from the plan's start change, with the noise of one and the same stream."""
    tuned = tuned_model(plan)
    load_adapter(tuned.model, from_bytes(tuned.start))
    before = flatten(tuned.model)
    trainer_module.train_model(
        tuned.model,
        records.units,
        encode(records, tuned.tokenizer, plan),
        plan,
        step,
        steps=steps,
        stream=SecureStream(bytes(32)),
        **options,
    )
    return flatten(tuned.model) - before


def plan_text(base: Path, *, count: int = 2, spare: int = 1) -> str:
    """A plan file as people write it: nothing frozen yet, and otherwise :func:`make_plan`'s."""
    return f"""
name = "tiny"
[model]
path = "{base}"
[tuner]
r = 2
target_modules = ["q_proj"]
[task]
objective = "classify"
max_length = 16
[data]
unit = "patient"
site = "hospital"
[rounds]
count = {count}
spare = {spare}
steps = 1
sampling_rate = 1.0
normaliser = 4
learning_rate = 0.01
[cohort]
minimum = 3
[privacy]
epsilon = 8.0
delta = 1e-5
clip = 0.5
"""


NAKED = Privacy(epsilon=math.inf, delta=1e-5, clip=0.5, records_per_unit=2)
"""No privacy: what is trained is what the data say."""


def key(name: str) -> bytes:
    """32 fixed secret bytes of one site."""
    return name.encode().ljust(32, b"\0")


@dataclasses.dataclass
class Recorder:
    """A trainer that keeps what its trainer gave."""

    trainer: Trainer
    requests: list[TrainRequest] = dataclasses.field(default_factory=list)
    results: list[TrainResult] = dataclasses.field(default_factory=list)

    def prepare(self, request: TrainRequest) -> None:
        self.trainer.prepare(request)

    def train(self, request: TrainRequest) -> TrainResult:
        result = self.trainer.train(request)
        self.requests.append(request)
        self.results.append(result)
        return result

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        return self.trainer.evaluate(plan, adapter, run)


def recorders(sites: Mapping[str, Records], *, keyed: bool = True) -> dict[str, Recorder]:
    """Each site's real trainer, watched; ``keyed`` makes its noise the same in every test."""
    return {
        name: Recorder(LocalTrainer(records, key=key(name) if keyed else None))
        for name, records in sites.items()
    }


def make_federation(
    folder: Path, plan: Plan, trainers: Mapping[str, Trainer], **options: Any
) -> Federation:
    """A federation with fixed keys of rounding."""
    tuned = tuned_model(plan)
    given: dict[str, Any] = {"keys": {name: key(name) for name in trainers}}
    return Federation(
        folder=folder,
        plan=plan,
        start=tuned.start,
        layout=tuned.layout,
        trainers=trainers,
        **(given | options),
    )


def events_of(folder: Path) -> list[Event]:
    """The coordinator's events of a federation."""
    store = RunStore(folder / "coordinator")
    try:
        return store.events(RUN)
    finally:
        store.close()


def facts_of(folder: Path, phase: Phase) -> list[tuple[Attempt, Any]]:
    """Attempt and facts of every event of one phase."""
    found = [event for event in events_of(folder) if event.phase is phase]
    return [(event.attempt, json.loads(event.payload)) for event in found]


def cohorts(folder: Path) -> list[list[int]]:
    """The sites in each committed round's sum."""
    return [facts["cohort"] for _, facts in facts_of(folder, Phase.COMMITTED)]


def blob(folder: Path, name: str) -> bytes:
    """A blob of the coordinator."""
    return (folder / "coordinator" / "blobs" / name).read_bytes()


def ledger_entries(folder: Path, site: int) -> list[dict[str, Any]]:
    """The entries of one site's ledger."""
    (path,) = (folder / "sites").glob(f"{site:04d}-*/ledger.jsonl")
    return [json.loads(line)["entry"] for line in path.read_text().splitlines()]


def sent(folder: Path, site: int) -> list[tuple[int, int, int]]:
    """The attempts that a site's ledger has as sent."""
    return [
        (entry["round"], entry["session"], entry["attempt"])
        for entry in ledger_entries(folder, site)
        if entry["kind"] == "sent"
    ]


def reviving(federation: Federation) -> Observer:
    """Starts killed sites again after each committed round."""

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase is Phase.COMMITTED:
            for node in federation.nodes.values():
                federation.grid.revive(node)

    return observe


def plain_updates(
    federation: Federation, trainers: Mapping[str, Recorder], attempt: Attempt, cohort: list[int]
) -> list[npt.NDArray[np.float32]]:
    """What the sites of a cohort put into an attempt's sum, as the plan's scheme sends it."""
    updates = []
    for site in cohort:
        watched = trainers[federation.names[site]]
        pairs = zip(watched.requests, watched.results, strict=True)
        mine = [pair for pair in pairs if pair[0].attempt.round == attempt.round]
        request, result = mine[-1]
        updates.append(request.rule.to_send(result.update))
    return updates


def words_of(data: bytes) -> Words:
    """The 32-bit words of a sum or a masked vector."""
    return np.frombuffer(data, dtype=np.uint32)


def chi_square(data: bytes) -> float:
    """Pearson's statistic of byte values against uniform: 255 expected, deviation 22.6."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def looks_uniform(data: bytes) -> bool:
    """Bytes and each bit of a byte within five standard deviations of uniform."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(-1, 8).mean(axis=0)
    deviation = 0.5 / math.sqrt(len(data))
    near = abs(chi_square(data) - 255) < 5 * math.sqrt(2 * 255)
    return near and bool((abs(bits - 0.5) < 5 * deviation).all())
