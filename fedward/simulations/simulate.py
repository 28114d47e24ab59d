"""``fedward simulate``: a whole federation and what it is compared with, from files to a report.

Everything that takes long is kept in the output folder as soon as it is known, so that an
interrupted simulation goes on where it stopped.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedward.aggregation.packing import unpack
from fedward.aggregation.participants import check_participants
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import Rule, masked_bytes
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.step_check import check_step
from fedward.client.trainer import LocalTrainer
from fedward.client.training import Trainer
from fedward.errors import ConfigurationError
from fedward.messages import parts_of
from fedward.plan import Plan
from fedward.server.registry import Registry
from fedward.server.registry_entries import add_run
from fedward.server.store import ROUND_ENDS, Phase, RunStore
from fedward.simulations import baseline
from fedward.simulations.case import Case, Options, load_case
from fedward.simulations.comparison import (
    CENTRAL,
    CENTRAL_NO_PRIVACY,
    Comparison,
    alone,
    comparisons,
    evaluate_adapter,
    measure,
    pooled,
)
from fedward.simulations.coordinator import fallback_of, gate_of
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
from fedward.simulations.run_folder import open_folder, read_json, write_atomically
from fedward.simulations.second_process import second_process
from fedward.tuning.metrics import Metrics
from fedward.tuning.models import resolve_model
from fedward.tuning.records import select
from fedward.tuning.tuned import tuned_model

_CURVE_RECORDS = 256
_SEEN_BYTES, _SEEN_NUMBERS = 48, 8
_TWICE = 2**30
"""Bytes of weights up to which the base is loaded a second time, for the comparisons."""

_Measure = Callable[[Comparison, Callable[[int], None]], Metrics]


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
    folder = open_folder(options, case)
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
    console.print(f"model: {_register(options, case.plan, folder)}", highlight=False)
    return report.to_json()


def _register(options: Options, plan: Plan, folder: Path) -> str:
    """Put the federated adapter into the registry; returns what it is called there."""
    registry = Registry(options.registry or options.out.parent / "registry")
    registry.keep_base(resolve_model(plan.model), str(plan.model.sha256))
    result = read_json(folder / "results" / "federated.json") or {}
    metrics = {key: result.get(key) for key in ("loss", "accuracy", "macro_f1")}
    with contextlib.closing(RunStore(folder / "coordinator")) as store:
        return f"{add_run(registry, plan, RUN, store, metrics).title} in {registry.folder}"


class _Work:
    """One simulation in its folder."""

    def __init__(self, case: Case, folder: Path, show: Progress, console: Console) -> None:
        self._case, self._folder, self._show, self._console = case, folder, show, console
        self._plan = case.plan
        self._tuned = tuned_model(case.plan)
        self._federation: Federation | None = None
        self._notes: dict[str, Any] = read_json(folder / "progress.json") or {
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
        covered = check_step(plan)
        if not covered.single_pass:
            self._console.print(str(covered), markup=False, highlight=False)
        most = max(masked_bytes(plan, self._tuned.layout))
        check_participants(plan, len(sites))
        asked, who = plan.rounds.participants, "a site"
        if asked is not None:
            who = "a site that is asked"
            self._console.print(
                f"each round asks {asked} of {len(sites)} sites, by a public draw", highlight=False
            )
        self._console.print(f"{who} sends {most:,} bytes of masked words a round", highlight=False)
        every = comparisons(plan, sites) if compare else []
        todo = deque(one for one in every if not self._result(one.name).exists())
        with self._second_process(todo) as rest:
            base = self._score(
                "base", lambda _: evaluate_adapter(plan, self._tuned.start, self._case.test)
            )
            federated, epsilon = self._federate(ray_workers)
            classical = self._classical() if compare else None
            self._work_through(todo.pop, lambda one, told: measure(one, self._case.test, told))
            if rest is not None:
                rest.result()
        return Report(
            plan=plan,
            scores=Scores(
                base=base,
                federated=federated,
                alone={site: self._known(alone(site)) for site in sites} if compare else {},
                central=self._known(CENTRAL) if compare else None,
                central_without_privacy=(
                    self._known(CENTRAL_NO_PRIVACY) if compare and plan.privacy.enabled else None
                ),
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

    @contextlib.contextmanager
    def _second_process(self, todo: deque[Comparison]) -> Iterator[Future[None] | None]:
        """Let a second process work through comparisons, if there is a core for it.

        Yields:
            What ends when it finds nothing more to do; None if there is no second process.
        """
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        weights = resolve_model(self._plan.model).glob("*.safetensors")
        if not todo or cores < 2 or sum(path.stat().st_size for path in weights) > _TWICE:
            yield None
            return
        half = min(threads, cores // 2)
        torch.set_num_threads(half)
        try:
            with (
                ThreadPoolExecutor(max_workers=1, thread_name_prefix="comparisons") as thread,
                second_process(self._case.test, half) as there,
            ):
                yield thread.submit(self._work_through, todo.popleft, there)
        finally:
            torch.set_num_threads(threads)

    def _work_through(self, take: Callable[[], Comparison], train: _Measure) -> None:
        """Train what nobody has taken yet, until nothing is left."""
        with contextlib.suppress(IndexError):
            while True:
                one = take()
                self._score(one.name, partial(train, one))

    def _federate(self, ray_workers: int) -> tuple[float, dict[str, float]]:
        """Run every open round; returns the score and each site's epsilon."""
        plan = self._plan
        task = self._show.add_task("federated rounds", total=plan.rounds.count)
        with _trainers(self._case, ray_workers, self._folder / "personal") as trainers:
            self._federation = federation = Federation(
                folder=self._folder,
                plan=plan,
                start=self._tuned.start,
                layout=self._tuned.layout,
                trainers=trainers,
                workers=max(1, ray_workers),
                fault=self._fault,
                watch=self._watch,
                fallback=fallback_of(plan, self._folder / "fallback"),
                gate=gate_of(plan),
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
                elif phase in ROUND_ENDS and isinstance(facts, Mapping):
                    if phase is Phase.FALLBACK:
                        self._console.print(f"round {attempt.round}: trained by the coordinator")
                    if phase is Phase.REFUSED:
                        why = f"round {attempt.round} refused: {facts['reason']}"
                        self._console.print(why, markup=False)
                    self._committed(attempt, facts)
                    self._show.update(task, completed=attempt.round)

            adapter = federation.run(observe)
            epsilon = {name: federation.epsilon_spent(name) for name in federation.names}
        write_atomically(self._folder / "models" / "federated.safetensors", adapter)
        score = self._score("federated", lambda _: evaluate_adapter(plan, adapter, self._case.test))
        return score, epsilon

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
        words = parts_of(message.content).get("words")
        if words is not None and self._federation is not None:
            name = self._federation.names[message.metadata.src_node_id - FIRST_NODE]
            self._masked = (name, words[:_SEEN_BYTES])

    def _catch_up(self) -> None:
        """Note the round that was committed in the instant before a kill."""
        with contextlib.closing(RunStore(self._folder / "coordinator")) as store:
            done = [event for event in store.events(RUN) if event.phase in ROUND_ENDS]
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
        notes["cohorts"].append([federation.names[site] for site in facts.get("cohort", ())])
        if "slots" in facts:
            notes.setdefault("slots", []).append(facts["slots"])
        for name, node in zip(federation.names, federation.nodes.values(), strict=True):
            notes["bytes_up"][name] += federation.grid.take_bytes_up(node)
            federation.grid.revive(node)
        if self._masked is not None and "sum" in facts and "groups" not in facts:
            parameters = planned_session(
                self._plan,
                federation.roster,
                attempt,
                task_hash=bytes(32),
                dimension=Rule(
                    settings=self._plan.aggregation, layout=self._tuned.layout, attempt=attempt
                ).words,
            )
            words = np.frombuffer(self._blob(facts["sum"]), dtype=parameters.grid.dtype)
            name, masked = self._masked
            total = unpack(words, parameters)[0][:_SEEN_NUMBERS].tolist()
            notes["seen"] = {"site": name, "masked": masked.hex(), "total": total}
        notes["seconds"] = self.before + time.monotonic() - self._began
        write_atomically(self._folder / "progress.json", json.dumps(notes).encode())

    def _blob(self, name: str) -> bytes:
        return (self._folder / "coordinator" / "blobs" / name).read_bytes()

    def _score(self, name: str, train: Callable[[Callable[[int], None]], Metrics]) -> float:
        """Train, evaluate on all test records and keep the result; done once a folder."""
        path = self._result(name)
        if not path.exists():
            task = self._show.add_task(name, total=self._plan.rounds.count)
            metrics = train(lambda done: self._show.update(task, completed=done))
            self._show.update(task, completed=self._plan.rounds.count)
            result = {
                "loss": metrics.loss,
                "accuracy": metrics.accuracy,
                "macro_f1": metrics.macro_f1,
                "losses": metrics.losses.tolist(),
                "correct": None if metrics.correct is None else metrics.correct.tolist(),
            }
            write_atomically(path, json.dumps(result).encode())
        return self._known(name)

    def _known(self, name: str) -> float:
        """The score of what is done."""
        result = json.loads(self._result(name).read_bytes())
        accuracy = result["accuracy"]
        return float(result["loss"] if accuracy is None else accuracy)

    def _result(self, name: str) -> Path:
        return self._folder / "results" / f"{_file_name(name)}.json"

    def _measure(self, metrics: Metrics) -> float:
        return metrics.loss if metrics.accuracy is None else metrics.accuracy

    def _classical(self) -> float | None:
        """The TF-IDF baseline, where the task has one and scikit-learn is installed."""
        if self._plan.task.objective != "classify":
            return None
        try:
            return baseline.accuracy(self._plan, pooled(self._case.sites), self._case.test)
        except ConfigurationError as error:
            self._console.print(str(error))
            return None

    def _seen(self) -> Seen | None:
        seen = self._notes["seen"]
        if seen is None:
            return None
        return Seen(site=seen["site"], masked=bytes.fromhex(seen["masked"]), total=seen["total"])


@contextlib.contextmanager
def _trainers(case: Case, workers: int, keep: Path) -> Iterator[Mapping[str, Trainer]]:
    """Each site's trainer: in this process, or as Ray tasks; personal parts lie in ``keep``."""
    sites, held_out = case.sites, case.held_out
    if workers == 0:
        yield {
            name: LocalTrainer(records, held_out=held_out.get(name), keep=keep / f"{n}")
            for n, (name, records) in enumerate(sorted(sites.items()))
        }
        return
    from fedward.simulations.ray_trainer import ray_trainers  # Ray is an extra

    with ray_trainers(sites, workers, held_out=held_out, keep=keep) as trainers:
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
