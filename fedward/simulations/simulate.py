"""``fedward simulate``: a whole federation and what it is compared with, from files to a report.

Everything that takes long is kept in the output folder as soon as it is known, so that an
interrupted simulation goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedward.aggregation.packing import unpack
from fedward.aggregation.planned import planned_session
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.trainer import LocalTrainer, Trainer
from fedward.errors import ConfigurationError
from fedward.plan import Plan, from_json
from fedward.server.store import Phase, RunStore
from fedward.simulations import baseline
from fedward.simulations.case import Case, Options, load_case
from fedward.simulations.comparison import evaluate_adapter, pooled, train_in_one_place
from fedward.simulations.federation import RUN, Federation
from fedward.simulations.grid import FIRST_NODE
from fedward.simulations.report import (
    Report,
    Scores,
    Seen,
    render_seen,
    render_sites,
    render_table,
    write_report,
)
from fedward.tuning.metrics import Metrics
from fedward.tuning.prompts import input_text
from fedward.tuning.records import Records, Row, select
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import dimension

_CURVE_RECORDS = 256
_SEEN_BYTES, _SEEN_NUMBERS = 48, 8


def run_simulation(options: Options, console: Console) -> dict[str, Any]:
    """Run, or go on with, the simulation in ``options.out``.

    Returns:
        The document of ``report.json``.

    Raises:
        ConfigurationError: The options do not fit together, or the folder holds another run.
        DataError: The data does not fit the plan.
        CohortTooSmall: Fewer sites than the plan's minimum can take part.
    """
    started = time.monotonic()
    case = load_case(options, console)
    folder = _open_folder(options, case.plan)
    with _progress(console) as show:
        work = _Work(case, folder, show, console)
        report = work.run(ray_workers=options.ray_workers, compare=options.compare)
    report = dataclasses.replace(report, seconds=work.before + time.monotonic() - started)
    write_report(options.out, report)
    console.print(render_table(report))
    console.print(render_sites(report))
    if report.seen is not None:
        console.print(render_seen(report.seen), highlight=False)
    console.print(f"report: {options.out / 'report.html'}")
    return report.to_json()


def _open_folder(options: Options, plan: Plan) -> Path:
    """The run's folder: a new one, or the old one of the same plan with ``--resume``."""
    folder, report = options.out / "run", options.out / "report.json"
    frozen = folder / "plan.json"
    if frozen.exists() and options.resume:
        if from_json(frozen.read_bytes()) != plan:
            raise ConfigurationError(
                f"{options.out} holds a run of another plan: give that plan (and data), or "
                "another --out"
            )
        return folder
    if frozen.exists() and not report.exists():
        raise ConfigurationError(
            f"{options.out} holds an unfinished run: add --resume to go on with it, or choose "
            "another --out"
        )
    report.unlink(missing_ok=True)
    if folder.exists():
        old = options.out / "run.old"  # killed while it deletes, no half of a run is left
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    folder.mkdir(parents=True, mode=0o700)
    _write_atomically(frozen, plan.to_json())
    return folder


class _Work:
    """One simulation in its folder."""

    def __init__(self, case: Case, folder: Path, show: Progress, console: Console) -> None:
        self._case, self._folder, self._show, self._console = case, folder, show, console
        self._plan = case.plan
        self._tuned = tuned_model(case.plan)
        self._federation: Federation | None = None
        self._notes: dict[str, Any] = _read_json(folder / "progress.json") or {
            "bytes_up": dict.fromkeys(case.sites, 0),
            "curve": [],
            "cohorts": [],
            "seconds": 0.0,
            "seen": None,
        }
        self.before: float = self._notes["seconds"]
        """Seconds that earlier goes took."""
        self._began = time.monotonic()
        self._masked: tuple[str, bytes] | None = None
        order = np.random.default_rng(0).permutation(len(case.test.units))
        self._curve_test = select(case.test, sorted(order[:_CURVE_RECORDS].tolist()))

    def run(self, *, ray_workers: int, compare: bool) -> Report:
        """Train and evaluate everything that is not there yet."""
        plan, sites = self._plan, self._case.sites
        base = self._score("base", lambda _: self._tuned.start)
        federated, epsilon = self._federate(ray_workers)
        alone, central, naked, classical = {}, None, None, None
        if compare:
            for name, records in sites.items():
                score = self._score(f"alone-{name}", self._one_place(plan, records, 1))
                alone[name] = score
            everything = pooled(sites)
            central = self._score("central", self._one_place(plan, everything, len(sites)))
            if plan.privacy.enabled:
                privacy = dataclasses.replace(plan.privacy, epsilon=math.inf)
                free = dataclasses.replace(plan, privacy=privacy)
                naked = self._score(
                    "central-no-privacy", self._one_place(free, everything, len(sites))
                )
            classical = self._classical(everything)
        return Report(
            plan=plan,
            scores=Scores(
                base=base,
                federated=federated,
                alone=alone,
                central=central,
                central_without_privacy=naked,
                classical=classical,
            ),
            epsilon=epsilon,
            bytes_up=self._notes["bytes_up"],
            rounds=len(self._notes["cohorts"]),
            seconds=0.0,
            curves={"federated": self._notes["curve"]},
            cohorts=self._notes["cohorts"],
            seen=self._seen(),
        )

    def _federate(self, ray_workers: int) -> tuple[float, dict[str, float]]:
        """Run every open round; returns the score and each site's epsilon."""
        plan = self._plan
        task = self._show.add_task("federated rounds", total=plan.rounds.count)
        with _trainers(self._case, ray_workers) as trainers:
            self._federation = federation = Federation(
                folder=self._folder,
                plan=plan,
                start=self._tuned.start,
                layout=self._tuned.layout,
                trainers=trainers,
                workers=max(1, ray_workers),
                fault=self._fault,
                watch=self._watch,
            )
            self._catch_up()
            self._show.update(task, completed=len(self._notes["cohorts"]))

            def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
                name = federation.names[site] if site >= 0 else ""
                if phase is Phase.LEFT_OUT and isinstance(facts, Mapping):
                    why = f"{facts['reason']} at {facts['at']}"
                    self._console.print(
                        f"round {attempt.round}: {name} left out: {why}", markup=False
                    )
                elif phase is Phase.ABORTED and isinstance(facts, Mapping):
                    self._console.print(
                        f"round {attempt.round} tried again: {facts['reason']}", markup=False
                    )
                elif phase is Phase.COMMITTED and isinstance(facts, Mapping):
                    self._committed(attempt, facts)
                    self._show.update(task, completed=attempt.round)

            adapter = federation.run(observe)
            epsilon = {name: federation.epsilon_spent(name) for name in federation.names}
        _write_atomically(self._folder / "models" / "federated.safetensors", adapter)
        return self._score("federated", lambda _: adapter), epsilon

    def _fault(self, node: int, message: Message) -> bool:
        """The demo's accident: one site dies in round 2, when the others send masked updates."""
        if self._case.killed is None or self._federation is None:
            return False
        victim = self._federation.names.index(self._case.killed) + FIRST_NODE
        metadata = message.metadata
        return (node, metadata.message_type, metadata.group_id) == (victim, "train.masked", "2")

    def _watch(self, message: Message) -> None:
        """Keep the first masked update that crosses."""
        if message.metadata.message_type != "train.masked" or not message.has_content():
            return
        words = message.content.array_records["parts"].get("words")
        if words is not None and self._federation is not None:
            name = self._federation.names[message.metadata.src_node_id - FIRST_NODE]
            self._masked = (name, bytes(words.data[:_SEEN_BYTES]))

    def _catch_up(self) -> None:
        """Note the round that was committed in the instant before a kill."""
        with contextlib.closing(RunStore(self._folder / "coordinator")) as store:
            done = [event for event in store.events(RUN) if event.phase is Phase.COMMITTED]
        for event in done[len(self._notes["cohorts"]) :]:
            self._committed(event.attempt, json.loads(event.payload))

    def _committed(self, attempt: Attempt, facts: Mapping[str, Any]) -> None:
        """After a round: evaluate for the curve, and keep what the report needs."""
        federation, notes = self._federation, self._notes
        if federation is None:
            return
        adapter = self._blob(facts["adapter"])
        score = self._measure(evaluate_adapter(self._plan, adapter, self._curve_test))
        if not notes["curve"]:
            start = evaluate_adapter(self._plan, self._tuned.start, self._curve_test)
            notes["curve"].append(self._measure(start))
        notes["curve"].append(score)
        notes["cohorts"].append([federation.names[site] for site in facts["cohort"]])
        if "slots" in facts:
            notes.setdefault("slots", []).append(facts["slots"])
        for name, node in zip(federation.names, federation.nodes.values(), strict=True):
            notes["bytes_up"][name] += federation.grid.take_bytes_up(node)
            federation.grid.revive(node)
        if self._masked is not None:
            parameters = planned_session(
                self._plan,
                federation.roster,
                attempt,
                task_hash=bytes(32),
                dimension=dimension(self._tuned.layout),
            )
            words = np.frombuffer(self._blob(facts["sum"]), dtype=parameters.grid.dtype)
            name, masked = self._masked
            total = unpack(words, parameters)[0][:_SEEN_NUMBERS].tolist()
            notes["seen"] = {"site": name, "masked": masked.hex(), "total": total}
        notes["seconds"] = self.before + time.monotonic() - self._began
        _write_atomically(self._folder / "progress.json", json.dumps(notes).encode())

    def _blob(self, name: str) -> bytes:
        return (self._folder / "coordinator" / "blobs" / name).read_bytes()

    def _one_place(
        self, plan: Plan, records: Records, sites: int
    ) -> Callable[[Callable[[int], None]], bytes]:
        """A training without a federation, that tells after each round how far it is."""

        def train(on_round: Callable[[int], None]) -> bytes:
            return train_in_one_place(plan, records, sites=sites, on_round=on_round)

        return train

    def _score(self, name: str, train: Callable[[Callable[[int], None]], bytes]) -> float:
        """Train, evaluate on all test records and keep the result; done once a folder."""
        path = self._folder / "results" / f"{_file_name(name)}.json"
        known = _read_json(path)
        if known is None:
            task = self._show.add_task(name, total=self._plan.rounds.count)
            adapter = train(lambda done: self._show.update(task, completed=done))
            metrics = evaluate_adapter(self._plan, adapter, self._case.test)
            self._show.update(task, completed=self._plan.rounds.count)
            known = {
                "loss": metrics.loss,
                "accuracy": metrics.accuracy,
                "macro_f1": metrics.macro_f1,
                "losses": metrics.losses.tolist(),
                "correct": None if metrics.correct is None else metrics.correct.tolist(),
            }
            _write_atomically(path, json.dumps(known).encode())
        classify = self._plan.task.objective == "classify"
        return float(known["accuracy"] if classify else known["loss"])

    def _measure(self, metrics: Metrics) -> float:
        return metrics.loss if metrics.accuracy is None else metrics.accuracy

    def _classical(self, records: Records) -> float | None:
        """The TF-IDF baseline, where the task has one and scikit-learn is installed."""
        data = self._plan.data
        if self._plan.task.objective != "classify":
            return None
        most = self._plan.task.max_length  # no more words than the model sees tokens

        def cut(rows: Sequence[Row]) -> list[dict[str, str]]:
            texts = [" ".join(input_text(row, data).split()[:most]) for row in rows]
            labels = [str(row[data.label]) for row in rows]
            return [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]

        train, test = cut(records.rows), cut(self._case.test.rows)
        try:
            return baseline.accuracy(train, test)
        except ConfigurationError as error:
            self._console.print(str(error))
            return None

    def _seen(self) -> Seen | None:
        seen = self._notes["seen"]
        if seen is None:
            return None
        return Seen(site=seen["site"], masked=bytes.fromhex(seen["masked"]), total=seen["total"])


@contextlib.contextmanager
def _trainers(case: Case, workers: int) -> Iterator[Mapping[str, Trainer]]:
    """Each site's trainer: in this process, or as Ray tasks."""
    sites, held_out = case.sites, case.held_out
    if workers == 0:
        yield {
            name: LocalTrainer(records, held_out=held_out.get(name))
            for name, records in sites.items()
        }
        return
    from fedward.simulations.ray_trainer import ray_trainers  # Ray is an extra

    with ray_trainers(sites, workers, held_out=held_out) as trainers:
        yield trainers


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(data)
    scratch.replace(path)
