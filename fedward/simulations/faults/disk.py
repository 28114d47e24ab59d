"""What a party's disk keeps when its process is killed, and what when the power goes.

The files are real ones. A kill loses nothing that was written. A power loss may lose whatever no
``fsync`` has covered: the tail of a line is torn off anywhere, a rename may not have happened, and
the file with the agent's signs of life, which is never synced, may be empty. What a file that
survived a kill unsynced has to fear stays until something syncs it.

SQLite is trusted to do what it says with ``synchronous=FULL``.
"""

from pathlib import Path

import numpy as np

CHAINS = ("ledger.jsonl", "memory.jsonl", "journal.jsonl")
"""A site's chained files, in the order in which a start opens them."""


class SiteDisk:
    """The folder of one site.

    Args:
        root: The site's folder.
        rng: Decides what is lost.
    """

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self._root, self._rng, self._opened = root, rng, 0
        self._seen: dict[str, int] = dict.fromkeys(CHAINS, 0)
        self._synced = self._seen
        self._files = RenamedFiles(root / "tasks", rng)

    def start(self) -> None:
        """A process begins to open the files."""
        self._opened = 0

    def note(self, point: str) -> None:
        """Take from a failpoint what has become durable: of the one chain that was written to."""
        self._files.note(point)
        if point == "chain.write":
            self._seen = self._sizes()
        elif point == "chain.written":
            grown = {name: n for name, n in self._sizes().items() if n != self._seen[name]}
            self._synced = self._synced | grown
        elif point == "chain.opened":
            name = CHAINS[self._opened]
            self._opened += 1
            self._synced = self._synced | {name: self._size(name)}

    def lose_power(self) -> str:
        """Lose what is not durable; returns what was lost, in words."""
        lost = [self._tear(name) for name in CHAINS] + [self._files.lose_power()]
        life = self._root / "life.json"
        if life.exists() and self._rng.random() < 0.5:
            life.write_bytes(b"")
        self._synced = self._sizes()
        return ", ".join(filter(None, lost)) or "nothing"

    def _tear(self, name: str) -> str:
        size, synced = self._size(name), self._synced[name]
        if size <= synced:
            return ""
        kept = int(self._rng.integers(synced, size))
        with (self._root / name).open("r+b") as file:
            file.truncate(kept)
        return f"{size - kept} of {name}'s last {size - synced} bytes"

    def _sizes(self) -> dict[str, int]:
        return {name: self._size(name) for name in CHAINS}

    def _size(self, name: str) -> int:
        path = self._root / name
        return path.stat().st_size if path.exists() else 0


class RenamedFiles:
    """A folder of files that are written whole, beside the old one, and renamed.

    Args:
        folder: Which.
        rng: Decides what is lost.
    """

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self._folder, self._rng, self._point = folder, rng, ""
        self._durable: dict[str, bytes] = {}

    def note(self, point: str) -> None:
        """A file is durable when the failpoint after ``file.renamed`` is reached."""
        if self._point == "file.renamed":
            self._durable = self._whole()
        self._point = point

    def lose_power(self) -> str:
        """Lose the end of a file that was being written, or renames that no sync has covered."""
        lost, now = "", self._whole()
        if self._point == "file.sync":
            for part in self._folder.glob("*.part"):
                part.write_bytes(part.read_bytes()[: int(self._rng.integers(8))])
                lost = "most of a new file"
        if now != self._durable and self._rng.random() < 0.75:
            for name in now.keys() | self._durable.keys():
                path = self._folder / name
                if name in self._durable:
                    path.write_bytes(self._durable[name])
                else:
                    path.unlink()
            lost = "a rename"
        self._durable, self._point = self._whole(), ""
        return lost

    def _whole(self) -> dict[str, bytes]:
        files = self._folder.glob("*") if self._folder.is_dir() else ()
        return {path.name: path.read_bytes() for path in files if path.suffix != ".part"}
