"""Patients' words, provoked into every error: they are nowhere but in the hospitals' own records.

Every note and every patient's number holds the canary. After the run each hospital's records are
replaced by files with the canary where a reader chokes on it, and the trainers are asked to read
them. Then the coordinator's disk, the wire in clear, both sides' logs and everything else that any
process wrote are searched. The control is a hospital that leaks: the search must find it in each.
"""

import dataclasses
from pathlib import Path

from fedward.private_files import write_private
from fedward.server.control_client import open_control
from fedward.server.start import prepare_start
from fedward.server.store import Phase
from fedward.typed_toml import dump
from tests.client.test_safe_logs import CANARY, FILES
from tests.field import evidence, notes, scene
from tests.field.machines import Field, facts_of

_ENDED = {"paused", "finished"}


def provoke(field: Field, base: Path) -> int:
    """Let the hospitals read every damaged file; returns how often a site complained meanwhile."""
    before = complaints(field)
    names, at_once = list(FILES), len(scene.HOSPITALS)
    for first in range(0, len(names), at_once):
        for hospital, name in zip(scene.HOSPITALS, names[first : first + at_once], strict=False):
            path = field.notes / hospital / name
            FILES[name](path)
            declaration = field.sites[hospital].data / "notes.toml"
            write_private(declaration, dump(notes.source_of(path)).encode())
        run(field, f"damaged-{first}", base)
    hospital, path = scene.HOSPITALS[0], field.notes / scene.HOSPITALS[0] / "damaged.csv"
    FILES[path.name](path)
    site = ["--site", str(field.sites[hospital].root)]
    log = field.root / f"{hospital}.log"
    for words in (
        ("data", "add", "notes", str(path), "--unit", "patient"),
        ("doctor",),
        ("status",),
        ("journal", "show", "--last", "1000"),
    ):
        said = field.command(hospital, "site", *words, *site, check=False)
        assert said, f"{words[0]} said nothing"
        log.write_bytes(log.read_bytes() + said)
    return complaints(field) - before


def complaints(field: Field) -> int:
    """Warnings of the hospitals' own code, for example of rows that cannot be read."""
    logs = [(field.root / f"{name}.log").read_text(errors="replace") for name in scene.HOSPITALS]
    return sum(log.count("WARNING fedward.") for log in logs)


def run(field: Field, name: str, base: Path) -> None:
    """A run of one round, until it ends or cannot go on."""
    whole = scene.make_plan(base)
    plan, start, layout = prepare_start(
        dataclasses.replace(
            whole,
            name=name,
            rounds=dataclasses.replace(whole.rounds, count=1, spare=1, steps=1),
            privacy=dataclasses.replace(whole.privacy, epsilon=0.5),
        )
    )
    with open_control(field.coordinator) as control:
        control.start(name, plan, start, layout)
        field.wait(f"the end of {name}", lambda: field.state(name) in _ENDED)
        if field.state(name) != "finished":
            control.call("Abort", name)
    asked = [facts_of(e)["sites"] for e in field.events(name) if e.phase is Phase.INVITED]
    assert asked, f"{name} asked nobody"


def search(field: Field) -> list[Path]:
    """The files outside the hospitals' records that hold the canary."""
    wire = b"".join(path.read_bytes() for path in field.copies.iterdir())
    for word in (b"/v1/fleet/push-messages", b"ready", b"lora_A"):
        assert word in wire, f"the wire was not copied: {word!r} is not in it"
    return evidence.holding(CANARY, field.root, but=[field.notes])


def leak(field: Field, base: Path) -> set[str]:
    """The control: one hospital leaks; returns the places where the search finds it."""
    hospital = scene.HOSPITALS[0]
    field.stop(hospital)
    declaration = field.sites[hospital].data / "notes.toml"
    write_private(declaration, dump(field.sources[hospital]).encode())
    field.start_site(hospital, "leaking")
    field.wait("the leaking hospital", field.all_online)
    run(field, "leaking", base)
    return {path.relative_to(field.root).parts[0] for path in search(field)}
