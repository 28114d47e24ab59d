"""Places where the processes of the field test wait until a fault has happened.

The test arms one place of one round; every process that comes by stays there, and says so, until
another is armed. So a kill hits the middle of a training or of a session on any machine.
"""

import time
from pathlib import Path

NOWHERE = "nowhere"


def training(number: int) -> str:
    """After the second step of a round's training."""
    return f"training {number}"


def masked(number: int) -> str:
    """Before the answer with the masked update of a round leaves."""
    return f"masked {number}"


def survivors(number: int) -> str:
    """Before the answer to the survivors of a round: the masked updates of all are in."""
    return f"survivors {number}"


def arm(root: Path, place: str) -> None:
    """Let processes wait at a place, and nowhere else."""
    scratch = root / "hold.part"
    scratch.write_text(place)
    scratch.replace(root / "hold")


def stay(site: Path, place: str) -> None:
    """Wait here, in a process of a site, while the place is armed."""
    while (site.parent / "hold").read_text() == place:
        site.with_name(f"{site.name}.held").write_text(place)
        time.sleep(0.05)


def all_stay(sites: list[Path], place: str) -> bool:
    """Whether a process of every site waits at a place."""
    marks = [site.with_name(f"{site.name}.held") for site in sites]
    return all(mark.exists() and mark.read_text() == place for mark in marks)
