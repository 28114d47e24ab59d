"""``make fault-test``: the faults of :mod:`tests.field.cases`, one a round, between real processes.

The machines are those of the field test, with :mod:`tests.field.proxy` on the cables, so that TLS
goes through from end to end. Every run must end by itself, every adapter must be what plain
arithmetic makes of the round's cohort with the sites' fixed keys, and every ledger must have what
left its site, once. At last one hospital counts its update twice: the check has to name the round.

``--page FILE`` writes the table into a page, ``--only PATTERN`` takes the cases with it in
``RUN: FAULT, STAGE``. The last line printed is a summary in JSON.
"""

import argparse
import dataclasses
import json
import logging
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward.client.journal import verify_journal
from fedward.client.site_folder import SiteFolder
from fedward.identity import Roster
from fedward.plan import Plan
from fedward.privacy.ledger import read_books
from fedward.server.control_client import open_control
from fedward.server.start import prepare_start
from fedward.server.store import Event, Phase, RunStore
from tests.field import cases, clocks, evidence, faults_page, hold, scene
from tests.field.cases import Case, Run
from tests.field.disturbances import Moment
from tests.field.machines import CONSOLE, Field, a_field, facts_of
from tests.field.reference import Arithmetic, fixed_trainer
from tests.field.wires import enter_namespace

AWAY_SECONDS = 120
"""So long a round waits for sites that are coming back."""

HIDDEN = 128
MOST_ROUNDS = 40


@dataclass(frozen=True, kw_only=True)
class Played:
    """A run that has ended.

    Args:
        name: The run's.
        plan: Frozen.
        start: The adapter before round 1.
        own: Its rounds in plain arithmetic.
        rosters: The one of each round.
        rows: What came of each fault.
        wrong: Where something else should have.
    """

    name: str
    plan: Plan
    start: bytes
    own: Arithmetic
    rosters: list[Roster] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)


def play(field: Field, run: Run, base: Path) -> Played:
    """One run, a fault in each round."""
    plan, start, layout = prepare_start(run.plan(scene.make_plan(base)))
    trainers = {
        name: fixed_trainer(site, field.sources[name], plan, name)
        for name, site in field.sites.items()
    }
    own = Arithmetic(plan=plan, layout=layout, trainers=trainers)
    played = Played(name=run.name, plan=plan, start=start, own=own)
    hold.arm(field.root, run.cases[0].place(1))
    with open_control(field.coordinator) as control:
        control.start(run.name, plan, start, layout)
    for number, case in enumerate(run.cases, 1):
        after = run.cases[number] if number < len(run.cases) else None
        at = Moment(field=field, victim=case.victim, run=run.name, number=number)
        marks = {log: log.stat().st_size for log in logs(field)}
        reach(at, case)
        played.rosters.append(field.roster())
        began = time.monotonic()
        if case.stage != "between":
            pause_before(at, after)
        with case.strike(at):
            if case.stage == "between":
                steer(field, "Resume", run.name)
                pause_before(at, after)
            hold.arm(field.root, after.place(number + 1) if after else hold.NOWHERE)
        at.wait()
        said = {log.stem: log.read_bytes()[size:].decode() for log, size in marks.items()}
        row = outcome(at, case, played.rosters[-1]) | {"seconds": round(time.monotonic() - began)}
        field.say(json.dumps(row))
        played.rows.append(row)
        try:
            case.check(row, said[case.at or case.victim])
        except AssertionError as wrong:  # the other cases are worth knowing all the same
            field.say(str(wrong))
            played.wrong.append(str(wrong))
    field.wait("the end of the run", lambda: field.state(run.name) == "finished")
    field.say(f"{run.name}: the run has ended by itself")
    return played


def reach(at: Moment, case: Case) -> None:
    """Wait until everything is where the fault strikes."""
    if case.stage == "between":
        at.field.wait("the pause", lambda: at.field.state(at.run) == "paused")
    else:
        at.field.wait_at(case.place(at.number), but=case.victim if case.apart else "")


def pause_before(at: Moment, after: Case | None) -> None:
    """Let the run pause at the end of this round where the next fault strikes between rounds."""
    if after is not None and after.stage == "between":
        at.field.wait("the round", lambda: at.events(Phase.INVITED) != [])
        steer(at.field, "Pause", at.run)


def steer(field: Field, verb: str, run: str) -> None:
    with open_control(field.coordinator) as control:
        control.call(verb, run)


def logs(field: Field) -> list[Path]:
    return [field.root / f"{name}.log" for name in ("coordinator", *scene.HOSPITALS)]


def outcome(at: Moment, case: Case, roster: Roster) -> dict[str, Any]:
    """What came of a fault."""
    (end,) = at.events(Phase.COMMITTED)
    names = {member.id: member.name for member in roster.members}
    out = [
        f"{names.get(e.site, e.site)}: {facts_of(e)['reason']}" for e in at.events(Phase.LEFT_OUT)
    ]
    return {
        "run": at.run,
        "round": at.number,
        "fault": case.fault,
        "stage": case.stage,
        "attempt": end.attempt.attempt,
        "cohort": [names[number] for number in facts_of(end)["cohort"]],
        "left_out": out,
        "aborted": [facts_of(e)["reason"] for e in at.events(Phase.ABORTED)],
        "spent": len(sent(at.field.root / case.victim, at.run, at.number)),
    }


def sent(site: Path, run: str, number: int) -> list[tuple[int, int]]:
    """Session and attempt of each update of a round that has left a site."""
    lines = SiteFolder(root=site).ledger.read_text().splitlines()
    entries = [json.loads(line)["entry"] for line in lines]
    return [
        (entry["session"], entry["attempt"])
        for entry in entries
        if entry["kind"] == "sent" and (entry["run"], entry["round"]) == (run, number)
    ]


def wrong_rounds(field: Field, played: Played) -> list[int]:
    """The rounds whose adapter is not what plain arithmetic makes of their cohort."""
    events = [e for e in field.events(played.name) if e.phase is Phase.COMMITTED]
    rounds = [e.attempt.round for e in events]
    assert rounds == list(range(1, played.plan.rounds.count + 1)), f"committed are {rounds}"
    store, before, wrong = RunStore(field.coordinator.runs), played.start, []
    try:
        for event, roster in zip(events, played.rosters, strict=True):
            after = store.blob(facts_of(event)["adapter"])
            draws = spent_before(field, event, roster)
            if played.own.next(roster, event.attempt, draws, before) != after:
                wrong.append(event.attempt.round)
            before = after
    finally:
        store.close()
    return wrong


def spent_before(field: Field, event: Event, roster: Roster) -> dict[str, int]:
    """Hospital of a cohort → updates of the round that it had spent before the one in the sum.

    That one is spent too, once.
    """
    names = {member.id: member.name for member in roster.members}
    attempt, draws = event.attempt, dict[str, int]()
    own = (attempt.session, attempt.attempt)
    for name in (names[number] for number in facts_of(event)["cohort"]):
        folders = [field.root / name, field.root / f"{name}-copy"]
        left = [sent(folder, attempt.run, attempt.round) for folder in folders if folder.exists()]
        (spent, *_) = [one for one in left if own in one] or [[]]
        assert spent.count(own) == 1, f"{attempt.order}: {name} has spent {left}"
        draws[name] = sum(one < own for one in spent)
    return draws


def check_books(site: SiteFolder) -> float:
    """A hospital's ledger and journal hold; returns what was spent."""
    key = site.identity().public_key
    assert verify_journal(site, key), f"{site.root} has an empty journal"
    books = read_books(site.ledger, key, epsilon=scene.MAX_EPSILON, delta=scene.DELTA)
    return books.epsilon_spent()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.field.run_faults")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    enter_namespace("tests.field.run_faults")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="fw") as scratch,
        a_field(Path(scratch), away=AWAY_SECONDS) as field,
    ):
        assert field.wires.real, "the cables need network namespaces, which are not allowed here"
        field.kernel, field.clocks = False, clocks.build(field.root)
        for machine in ("coordinator", *scene.HOSPITALS):
            clocks.set_wrong(field.clock(machine), 0)
        base = scene.make_base(field.root / "base", HIDDEN)
        field.open(base, wire=field.start_proxy, rounds=MOST_ROUNDS)
        sites, played = dict(field.sites), list[Played]()
        for run in chosen(asked.only, clocks=field.clocks is not None):
            played.append(play(field, run, base))
            wrong = wrong_rounds(field, played[-1])
            assert not wrong, f"{run.name}: the adapters of rounds {wrong} have other bits"
            field.say(f"{run.name}: every adapter is the one of its cohort")
        failed = [words for one in played for words in one.wrong]
        assert not failed, "\n".join(failed)
        epsilon = max(map(check_books, sites.values()))
        masks, noises = evidence.streams([site.root for site in sites.values()])
        control = wrong_rounds(field, plant(field, base))
        assert control == [1], f"the planted bug is found in rounds {control}"
        field.say("a hospital that counts twice is found")
        rows = [row for one in played for row in one.rows if row["fault"] != "none"]
        summary = {
            "fault_test": "passed",
            "pairs": len(rows),
            "epsilon": round(epsilon, 3),
            "mask_streams": masks,
            "noise_streams": noises,
            "seconds": round(time.monotonic() - field.started),
        }
        if asked.page:
            faults_page.write(asked.page, rows)
        CONSOLE.print(json.dumps({**summary, "rows": rows}), markup=False)
    return 0


def chosen(only: str, *, clocks: bool) -> list[Run]:
    """The runs, with the cases that a pattern is found in."""
    found = []
    for run in cases.RUNS:
        kept = [c for c in run.cases[1:] if re.search(only, f"{run.name}: {c.fault}, {c.stage}")]
        if kept and (clocks or run.name != "clocks"):
            found.append(Run(name=run.name, deadline=run.deadline, cases=[run.cases[0], *kept]))
    return found


def plant(field: Field, base: Path) -> Played:
    """The control: a run of one round in which a hospital puts its update into the sum twice."""
    liar = next(iter(field.sites))
    field.stop(liar)
    field.start_site(liar, "doubling")
    field.wait("the hospital that counts twice", field.all_online)
    return play(field, Run(name="planted", deadline="10m", cases=[cases.NONE]), base)


if __name__ == "__main__":
    sys.exit(main())
