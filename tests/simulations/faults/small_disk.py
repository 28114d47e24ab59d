"""A real file system of some KiB, to be filled and made read-only; it needs root."""

import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs over a folder, which keeps what was in it."""

    def __init__(self, folder: Path, kib: int) -> None:
        aside = folder.with_name(f"{folder.name}.aside")
        folder.rename(aside)
        folder.mkdir(mode=0o700)
        self.folder = folder
        mount = shutil.which("mount")
        if mount is None:
            pytest.skip("there is no mount")
        options = f"size={kib}k,mode=0700"
        command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        self._mount = mount
        shutil.copytree(aside, folder, dirs_exist_ok=True)

    def fill(self) -> None:
        """Not one block is left."""
        with (self.folder / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                return

    def free(self) -> None:
        """Somebody makes room."""
        (self.folder / "filler").unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        """Make it ``ro`` or ``rw``; nobody may have a file open for writing."""
        subprocess.run([self._mount, "-o", f"remount,{how}", str(self.folder)], check=True)

    def close(self) -> None:
        """Take it away, with all that is on it."""
        command = [str(Path(self._mount).with_name("umount")), "--lazy", str(self.folder)]
        subprocess.run(command, check=True)
