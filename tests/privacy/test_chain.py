import errno
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedward.canonical import canonical_json
from fedward.errors import LedgerError, LedgerRolledBack
from fedward.identity import Identity
from fedward.privacy.chain import Chain, read_lines

KEY = Identity(bytes(32))
ENTRIES: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 2, "text": "täxt\n", "x": [0.1, None]},
    {"n": 3, "inf": float("inf")},
]


def opened(path: Path) -> Chain:
    return Chain(path, KEY, purpose="test")


def written(path: Path) -> bytes:
    with opened(path) as chain:
        for entry in ENTRIES:
            chain.append(entry)
    return bytes(path.read_bytes())


def test_entries_come_back_in_order(tmp_path):
    path = tmp_path / "chain"
    written(path)
    with opened(path) as chain:
        assert chain.entries == ENTRIES
        head = chain.head
        chain.append({"n": 4})
        assert chain.head[0] == 4
    with opened(path) as chain:
        assert chain.entries == [*ENTRIES, {"n": 4}]
        chain.check_anchor(*head)
        chain.check_anchor(0, "0" * 64)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_chain_that_forgets_holds_no_entries_and_the_same_file(tmp_path):
    path = tmp_path / "chain"
    written(path)
    with opened(path) as chain:
        chain.forget()
        chain.append({"n": 4})
        assert (chain.entries, chain.head[0]) == ([], 4)
        assert chain.line(4) == chain.head[1]
    with opened(path) as chain:
        assert chain.entries == [*ENTRIES, {"n": 4}]


def test_heads_of_equal_entries_differ(tmp_path):
    # The salt: whoever guesses an entry cannot confirm it by the head that leaves the site.
    written(tmp_path / "one")
    written(tmp_path / "other")
    with opened(tmp_path / "one") as one, opened(tmp_path / "other") as other:
        assert one.entries == other.entries
        assert one.head != other.head


def test_cut_at_every_byte_it_opens_with_what_was_whole(tmp_path):
    data = written(tmp_path / "chain")
    edges = {place + n for place, byte in enumerate(data) if byte == 10 for n in (0, 1, 2)}
    for cut in sorted({*range(0, len(data), 7), *edges, len(data)} - {len(data) + 1}):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        with opened(path) as chain:
            whole = data[:cut].count(b"\n")
            assert chain.entries == ENTRIES[:whole]
            assert len(path.read_bytes()) == data[:cut].rfind(b"\n") + 1
            if cut % 5:
                continue
            chain.append({"n": 9})
        with opened(path) as chain:
            assert chain.entries == [*ENTRIES[:whole], {"n": 9}]


def test_every_flipped_byte_is_refused_with_its_line(tmp_path):
    data = written(tmp_path / "chain")
    path = tmp_path / "flipped"
    for place in range(len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= (1, 2, 128)[place % 3]
        path.write_bytes(flipped)
        line = data[:place].count(b"\n") + 1
        with pytest.raises(LedgerError, match=f"line {line} "):
            opened(path)


def test_lines_deleted_moved_repeated_or_foreign_are_refused(tmp_path):
    one, two, three = written(tmp_path / "chain").splitlines(keepends=True)
    foreign = _foreign(tmp_path)
    path = tmp_path / "changed"
    for lines, line in [
        ([two, three], 1), ([one, three], 2), ([two, one, three], 1), ([one, one, two], 2),
        ([one, two, three, two], 4), ([foreign], 1), ([one, b"\n"], 2), ([b"[]\n"], 1),
        ([one, b"{}\n", three], 2), ([one.replace(b":1", b": 1")], 1),
    ]:  # fmt: skip
        path.write_bytes(b"".join(lines))
        with pytest.raises(LedgerError, match=f"line {line} "):
            opened(path)


def _foreign(folder: Path) -> bytes:
    with Chain(folder / "foreign", Identity(b"x" * 32), purpose="test") as chain:
        chain.append({"n": 1})
    return bytes((folder / "foreign").read_bytes())


def test_a_signature_for_another_purpose_is_refused(tmp_path):
    written(tmp_path / "chain")
    with pytest.raises(LedgerError, match="line 1 was not signed"):
        Chain(tmp_path / "chain", KEY, purpose="other")


def test_an_entry_rewritten_with_a_fitting_hash_needs_the_key(tmp_path):
    data = written(tmp_path / "chain")
    record = json.loads(data.splitlines()[2])
    record["entry"] = {"n": 7}
    bare = {key: record[key] for key in ("entry", "prev", "salt", "seq")}
    record["h"] = hashlib.sha256(canonical_json(bare)).hexdigest()
    lines = [*data.splitlines()[:2], canonical_json(record), b""]
    (tmp_path / "chain").write_bytes(b"\n".join(lines))
    with pytest.raises(LedgerError, match="line 3 was not signed"):
        opened(tmp_path / "chain")


def test_a_rolled_back_file_is_noticed_by_its_anchor(tmp_path):
    path = tmp_path / "chain"
    data = written(path)
    with opened(path) as chain:
        anchor = chain.head
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:2]))
    with opened(path) as chain, pytest.raises(LedgerRolledBack, match="line 3 is missing"):
        chain.check_anchor(*anchor)
    with opened(path) as chain:
        chain.append({"n": 3})
        with pytest.raises(LedgerRolledBack, match="line 3 is not the line"):
            chain.check_anchor(*anchor)


def test_short_writes_lose_nothing(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    written(tmp_path / "chain")
    with opened(tmp_path / "chain") as chain:
        assert chain.entries == ENTRIES


def failing(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("calls", [("fsync",), ("write", "ftruncate")])
def test_after_a_failed_disk_it_refuses_until_opened_again(tmp_path, monkeypatch, calls):
    written(tmp_path / "chain")
    chain = opened(tmp_path / "chain")
    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, failing)
        with pytest.raises(LedgerError, match="Input/output error; mend it and open it again"):
            chain.append({"n": 4})
    with pytest.raises(LedgerError, match="open it again"):
        chain.append({"n": 4})
    assert chain.entries == ENTRIES
    chain.close()
    with opened(tmp_path / "chain") as chain:
        assert chain.entries[:3] == ENTRIES


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Leaves room for 50 bytes more than a size: a part of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
    try:
        yield
    finally:  # before pytest writes its own report, which may go to a larger file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_takes_nothing_loses_nothing_and_the_chain_goes_on(tmp_path):
    path = tmp_path / "chain"
    size = len(written(path))
    with opened(path) as chain:
        head = chain.head
        with full_disk(size):
            for _ in range(3):
                with pytest.raises(LedgerError, match="File too large; make room, and it goes on"):
                    chain.append({"n": 4})
                assert (path.stat().st_size, chain.head, chain.entries) == (size, head, ENTRIES)
        chain.append({"n": 5})
    with opened(path) as again:
        assert again.entries == [*ENTRIES, {"n": 5}]


def test_a_chain_opens_on_a_full_disk_with_a_torn_line(tmp_path):
    path = tmp_path / "chain"
    data = written(path)
    path.write_bytes(data + data[:50])
    with full_disk(len(data)), opened(path) as chain:
        assert chain.entries == ENTRIES
        with pytest.raises(LedgerError, match="make room"):
            chain.append({"n": 4})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_really_full_disk(tmp_path):
    """Not a limit of one process: a disk of 64 KiB that another file has filled."""
    mounted = ["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount")
    try:
        _fill_and_go_on(tmp_path)
    finally:
        subprocess.run(["/bin/umount", str(tmp_path)], check=True)


def _fill_and_go_on(folder: Path) -> None:
    path, other = folder / "chain", folder / "other"
    with opened(path) as chain:
        other.write_bytes(bytes(40_000))
        acknowledged = 0
        with pytest.raises(LedgerError, match="No space left on device; make room"):
            while True:
                chain.append({"n": acknowledged, "text": "x" * 300})
                acknowledged += 1
        other.unlink()
        chain.append({"n": acknowledged})
    with opened(path) as again:
        assert [entry["n"] for entry in again.entries] == list(range(acknowledged + 1))
    assert acknowledged > 10


def test_somebody_else_may_read_while_it_is_held(tmp_path):
    path = tmp_path / "chain"
    data = written(path)
    with opened(path):
        found = read_lines(data + b'{"torn', KEY.public_key, purpose="test", path=path)
    assert [entry for entry, _ in found] == ENTRIES
    assert path.read_bytes() == data, "a reader changes nothing"
    with pytest.raises(LedgerError, match="line 1 was not signed"):
        read_lines(data, Identity(b"x" * 32).public_key, purpose="test", path=path)


def test_two_processes_cannot_hold_it(tmp_path):
    with (
        opened(tmp_path / "chain"),
        pytest.raises(LedgerError, match="another process holds it"),
    ):
        opened(tmp_path / "chain")
    opened(tmp_path / "chain").close()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(LedgerError, match="No such file"):
        opened(tmp_path / "no" / "chain")


WRITER = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from fedward.identity import Identity
from fedward.privacy.chain import Chain
chain = Chain(Path(sys.argv[1]), Identity(bytes(32)), purpose="test")
while True:
    n = len(chain.entries)
    chain.append({"n": n})
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_no_acknowledged_entry(tmp_path):
    path, entries = tmp_path / "chain", 0
    for kill in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(3 + 5 * kill)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split()]
        process.stdout.close()
        process.wait()
        with opened(path) as chain:
            numbers = [entry["n"] for entry in chain.entries]
        assert numbers == list(range(len(numbers)))
        assert acknowledged == list(range(entries, entries + len(acknowledged)))
        assert len(numbers) - (entries + len(acknowledged)) in (0, 1)
        entries = len(numbers)


def test_an_error_between_disk_and_memory_stops_the_chain(tmp_path, monkeypatch):
    """Found by the fault laboratory: two lines of one number, and no start again."""
    with opened(tmp_path / "chain") as chain:
        chain.append({"n": 1})
        with monkeypatch.context() as memory_exhausted:
            memory_exhausted.setattr(json, "loads", raise_memory_error)
            with pytest.raises(MemoryError):
                chain.append({"n": 2})
        with pytest.raises(LedgerError, match="open it again"):
            chain.append({"n": 3})
    with opened(tmp_path / "chain") as chain:
        assert chain.entries == [{"n": 1}, {"n": 2}]


def raise_memory_error(*_: object) -> None:
    raise MemoryError
