"""``fedward site run`` of one hospital of the field test: its keys are fixed, its masks noted.

It waits in the middle of a session where the test asks for that.
``python -m tests.field.site FOLDER HOSPITAL honest|leaking|doubling``. The leaking one is the
control of the search for patients' words: it reads a note, logs it, and puts it beside its answers.
The doubling one is the control of the check of sums: it counts its update twice.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

from fedward import cli
from fedward.client.safe_logs import keep_records_out_of_logs


def note_masks(file: Path) -> None:
    """Note every mask stream with the vector that it is applied to."""
    from fedward.aggregation import masks, site_session
    from fedward.aggregation.masks import Words
    from tests.field import evidence

    def noted(
        vector: Words, *, add: Sequence[bytes], subtract: Sequence[bytes], threads: int
    ) -> None:
        for key in add:
            evidence.mark(file, key + b"+", vector.tobytes())
        for key in subtract:
            evidence.mark(file, key + b"-", vector.tobytes())
        masks.apply_masks(vector, add=add, subtract=subtract, threads=threads)

    patch.object(site_session, "apply_masks", noted).start()


def hold_sessions(root: Path) -> None:
    """Wait before a masked update leaves and before the answer to its survivors, if told to."""
    from fedward.aggregation.masks import Words
    from fedward.aggregation.site_session import SiteSession
    from tests.field import hold

    consistency, masked = SiteSession.consistency, SiteSession.masked

    def held(session: SiteSession, message: bytes) -> bytes:
        hold.stay(root, hold.survivors(session._expected.attempt.round))
        return consistency(session, message)

    def held_masked(session: SiteSession, message: bytes, words: Words) -> tuple[bytes, Words]:
        answer = masked(session, message, words)
        hold.stay(root, hold.masked(session._expected.attempt.round))
        return answer

    patch.object(SiteSession, "consistency", held).start()
    patch.object(SiteSession, "masked", held_masked).start()


def start_trainer(root: str, hospital: str) -> None:
    """The child is the real train-service too, with fixed keys."""
    from fedward.client import remote_trainer
    from fedward.client.trainer_process import TrainerProcess

    def process(command: Sequence[str], environment: Mapping[str, str]) -> TrainerProcess:
        mine = [sys.executable, "-m", "tests.field.trainer", root, hospital]
        passed = ("PYTHONPATH", "FIELD_WATCH", "LD_PRELOAD", "FIELD_CLOCK")
        kept = {name: os.environ[name] for name in passed if name in os.environ}
        return TrainerProcess(mine, {**environment, **kept})

    patch.object(remote_trainer, "TrainerProcess", process).start()


def leak(root: Path) -> None:
    from fedward.client.agent import Agent
    from fedward.client.data_sources import load_source
    from fedward.client.site_folder import SiteFolder
    from fedward.errors import SiteCode
    from fedward.messages import Letter

    folder, act = SiteFolder.load(root), Agent._act

    def leaking(agent: Agent, letter: Letter) -> tuple[SiteCode, Mapping[str, bytes]]:
        note = Path(load_source(folder, "notes").path).read_bytes()[:2000]
        logging.getLogger("fedward.client.agent").warning("a note: %r", note)
        code, parts = act(agent, letter)
        return code, {**parts, "note": note}

    patch.object(Agent, "_act", leaking).start()


def double() -> None:
    """Put every update into the sum twice."""
    from fedward.aggregation.masks import Words
    from fedward.client.agent import Agent, _Work

    words = Agent._words

    def doubled(agent: Agent, work: _Work) -> Words:
        once = words(agent, work)
        return once + once

    patch.object(Agent, "_words", doubled).start()


def main(root: str, hospital: str, how: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    keep_records_out_of_logs()  # before any library is there, as the command has it
    from fedward.client import daemon
    from tests.field import scene

    note_masks(scene.masks_of(Path(root)))
    hold_sessions(Path(root))
    start_trainer(root, hospital)
    run_site = partial(daemon.run_site, key=scene.secret(hospital, "rounding"))
    patch.object(daemon, "run_site", run_site).start()
    if how == "leaking":
        leak(Path(root))
    if how == "doubling":
        double()
    sys.argv = ["fedward", "site", "run", "--site", root]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
