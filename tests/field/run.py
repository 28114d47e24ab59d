"""``make field-test``: a coordinator and four hospitals as processes, killed in mid-round.

Each has a network namespace of its own where that is allowed, with one cable to the coordinator.
Rounds 2 to 6 have a fault while the sites train: kill -9 of the coordinator, all of it; of an
agent; of a trainer; of an agent that stays away; a cable that is pulled for some seconds. Rounds 7
and 8 have theirs when the masked updates are in: kill -9 of an agent, and of the coordinator. The
run must end by itself, and every adapter must be bit for bit that of the same run without a network
and without a process, in which the fourth site is missing from round 5 and the first attempt at
round 8 is lost as well. Then the hospitals' words are searched for (:mod:`tests.field.leaks`).

The last line printed is a summary in JSON.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from fedward.server.control_client import open_control
from fedward.server.start import prepare_start
from tests.field import faults, leaks, scene
from tests.field.machines import CONSOLE, Field, a_field
from tests.field.wires import enter_namespace


def start(field: Field, base: Path) -> None:
    """Start the run."""
    faults.arm_first(field)
    plan = scene.write_plan(scene.make_plan(base), field.root / "plan.toml")
    root = str(field.coordinator.root)
    words = ["run", "start", str(plan), "--name", scene.RUN, "--coordinator", root]
    shown = json.loads(field.command("coordinator", *words, "--json"))
    assert (shown["name"], shown["rounds"]) == (scene.RUN, scene.ROUNDS)
    with open_control(field.coordinator) as control:  # the same again changes nothing
        again = control.start(scene.RUN, *prepare_start(scene.make_plan(base)))
    assert again["plan_hash"] == shown["plan_hash"]


def main() -> int:
    enter_namespace("tests.field.run")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="fw") as scratch, a_field(Path(scratch)) as field:
        base = scene.make_base(field.root / "base")
        field.open(base, wire=field.start_relay)
        start(field, base)
        faults.disturb(field)
        field.wait("the end of the run", lambda: field.state(scene.RUN) == "finished")
        field.say("the run has ended by itself")
        facts = faults.check(field, faults.undisturbed(field, base))
        field.say("every adapter is the undisturbed run's, and every ledger is right")
        complaints = leaks.provoke(field, base)
        assert complaints > len(scene.HOSPITALS), "the damaged records were not read"
        found = leaks.search(field)
        assert not found, f"patients' words are in {found}"
        field.say(f"no patient's word left the records, in spite of {complaints} complaints")
        places = leaks.leak(field, base)
        control = {"coordinator", "wire", f"{scene.HOSPITALS[0]}.log"}
        assert control <= places, f"the leaking hospital is found in {places} alone"
        field.say("the hospital that leaks is found on the wire, at the coordinator, in its log")
        field.end()
        facts |= faults.check_wire(field)
        summary = {
            "field_test": "passed",
            "hospitals": len(field.sites),
            "rounds": scene.ROUNDS,
            "kills": 6,
            "cuts": int(field.wires.real),
            **facts,
            "seconds": round(time.monotonic() - field.started),
        }
        CONSOLE.print(json.dumps(summary), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
