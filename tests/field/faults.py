"""The faults of the field test, one a round, and what every disk must say afterwards."""

import json
import time
from pathlib import Path
from typing import Any

from fedward.client.journal import verify_journal
from fedward.privacy.ledger import read_books
from fedward.server.start import prepare_start
from fedward.server.store import Phase
from tests.field import evidence, hold, scene
from tests.field.machines import TRACED, Field, facts_of
from tests.field.reference import Reference

AWAY_ROUND = 5
CUT_ROUND, CUT_SECONDS = 6, 6.0
MASKED_ROUND = 7
LOST_ROUND = 8


def arm_first(field: Field) -> None:
    """Let the sites wait for the first fault; call it before the run starts."""
    hold.arm(field.root, hold.training(2))


def disturb(field: Field) -> None:
    """One fault a round, from round 2 on."""
    disturb_training(field)
    disturb_masked(field)


def disturb_training(field: Field) -> None:
    """Faults while the sites train: nothing of an update has left yet."""
    victim, other, third, away = scene.HOSPITALS
    field.wait_at(hold.training(2))
    field.kill("coordinator", group=True)
    hold.arm(field.root, hold.training(3))
    field.say("round 2: kill -9 of the coordinator, every process of it")
    time.sleep(2)
    field.serve()

    field.wait_at(hold.training(3))
    field.kill(victim)
    hold.arm(field.root, hold.training(4))
    field.say(f"round 3: kill -9 of the agent of {victim}")
    field.start_site(victim)

    field.wait_at(hold.training(4))
    field.kill_trainer(other)
    hold.arm(field.root, hold.training(AWAY_ROUND))
    field.say(f"round 4: kill -9 of the trainer of {other}")

    field.wait_at(hold.training(AWAY_ROUND))
    field.kill(away)
    field.steer("pause")
    hold.arm(field.root, hold.training(CUT_ROUND))
    field.say(f"round {AWAY_ROUND}: kill -9 of the agent of {away}, which stays away")
    field.wait(
        f"round {AWAY_ROUND} without {away}",
        lambda: field.reached(AWAY_ROUND, Phase.COMMITTED),
    )
    field.start_site(away)
    field.wait(f"{away} online", field.all_online)
    field.say(f"{away} is back, and the paused run goes on")
    field.steer("resume")

    field.wait_at(hold.training(CUT_ROUND))
    if field.wires.real:
        field.wires.cut(third)
        field.say(f"round {CUT_ROUND}: the cable of {third} is pulled")
    hold.arm(field.root, hold.survivors(MASKED_ROUND))
    if field.wires.real:
        time.sleep(CUT_SECONDS)
        field.wires.heal(third)
        field.say("it is in again")


def disturb_masked(field: Field) -> None:
    """Faults when the masked updates of all are in: they are spent."""
    other = scene.HOSPITALS[1]
    field.wait_at(hold.survivors(MASKED_ROUND))
    field.kill(other)
    hold.arm(field.root, hold.survivors(LOST_ROUND))
    field.say(f"round {MASKED_ROUND}: kill -9 of the agent of {other}, whose masked update is in")
    field.start_site(other)

    field.wait_at(hold.survivors(LOST_ROUND))
    field.kill("coordinator", group=True)
    hold.arm(field.root, hold.NOWHERE)
    field.say(f"round {LOST_ROUND}: kill -9 of the coordinator, with every masked update in")
    field.serve()
    field.wait("the coordinator", field.is_serving)


def undisturbed(field: Field, base: Path) -> list[str]:
    """The adapters of the same run in this process; the same updates are lost after they left."""
    plan, start, layout = prepare_start(scene.make_plan(base))
    folder = field.root / "undisturbed"
    folder.mkdir()
    reference = Reference(
        folder=folder,
        identity=field.coordinator.identity(),
        roster=field.roster(),
        sites=field.sites,
        sources=field.sources,
        plan=plan,
        start=start,
        layout=layout,
    )
    return reference.run(missing=(AWAY_ROUND, scene.HOSPITALS[-1]), lost=LOST_ROUND)


def check(field: Field, expected: list[str]) -> dict[str, Any]:
    """Every promise, against what is on the disks."""
    events = field.events()
    committed = [facts_of(e) for e in events if e.phase is Phase.COMMITTED]
    ids = {member.name: member.id for member in field.roster().members}
    cohorts = [facts["cohort"] for facts in committed]
    everybody = sorted(ids.values())
    wanted = [everybody] * scene.ROUNDS
    away = ids[scene.HOSPITALS[-1]]
    wanted[AWAY_ROUND - 1] = [site for site in everybody if site != away]
    assert cohorts == wanted, f"cohorts {cohorts}"
    found = [facts["adapter"] for facts in committed]
    other = [n for n, (one, two) in enumerate(zip(found, expected, strict=True), 1) if one != two]
    assert not other, f"the adapters of rounds {other} have other bits"
    epsilons = [check_books(field, name, ids[name], cohorts) for name in field.sites]
    return {
        "attempts": len({event.attempt for event in events}),
        "epsilon": round(max(epsilons), 3),
        **check_secrets(field),
    }


def check_books(field: Field, name: str, number: int, cohorts: list[list[int]]) -> float:
    """One hospital's ledger has what left it, each once, and its journal holds."""
    site = field.sites[name]
    entries = [json.loads(line)["entry"] for line in site.ledger.read_text().splitlines()]
    sent = [entry["round"] for entry in entries if entry["kind"] == "sent"]
    took_part = [n for n, cohort in enumerate(cohorts, 1) if number in cohort]
    # What was lost after it had left is spent, and a spare round pays for the update after it.
    assert sent == [*took_part, LOST_ROUND], f"{name} sent {sent}, was in the sums of {took_part}"
    key = site.identity().public_key
    books = read_books(site.ledger, key, epsilon=scene.MAX_EPSILON, delta=scene.DELTA)
    spent = books.epsilon_spent()
    assert 0 < spent <= scene.EPSILON
    assert verify_journal(site, key), f"{name} has an empty journal"
    return spent


def check_secrets(field: Field) -> dict[str, int]:
    """No mask stream covers two inputs, and no noise stream two updates."""
    masks, noises = evidence.streams([site.root for site in field.sites.values()])
    updates = len(field.sites) * (scene.ROUNDS + 1) - 1  # one is lost, one site is away once
    assert noises >= updates, f"{noises} noise streams for {updates} updates"
    assert masks >= updates, f"{masks} mask streams for {updates} updates"
    return {"mask_streams": masks, "noise_streams": noises}


def check_wire(field: Field) -> dict[str, Any]:
    """No process of a site asked for any address but the coordinator's; call it at the end."""
    host, port = field.wires.address, field.port
    for name in field.sites:
        watched = field.watched(name).read_text()
        assert "socket.connect" in watched, f"the watch of {name} saw nothing"
        found = evidence.strangers(watched, host, port)
        assert not found, f"{name} asked for {found[:3]}"
    if field.kernel:
        traced = field.traced(TRACED).read_text(errors="replace")
        assert host in traced, "the kernel's watch saw nothing"
        found = evidence.strangers_of_kernel(traced, host, port)
        assert not found, f"{TRACED} asked for {found[:3]}"
    return {"namespaces": field.wires.real, "kernel_watch": field.kernel}
