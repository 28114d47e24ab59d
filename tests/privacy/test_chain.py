import errno
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedward.canonical import canonical_json
from fedward.errors import LedgerError
from fedward.identity import Identity
from fedward.privacy.chain import Chain

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
    with opened(path) as chain, pytest.raises(LedgerError, match="line 3 is missing"):
        chain.check_anchor(*anchor)
    with opened(path) as chain:
        chain.append({"n": 3})
        with pytest.raises(LedgerError, match="line 3 is not the line"):
            chain.check_anchor(*anchor)


def test_short_writes_lose_nothing(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    written(tmp_path / "chain")
    with opened(tmp_path / "chain") as chain:
        assert chain.entries == ENTRIES


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_failed_write_it_refuses_until_opened_again(tmp_path, monkeypatch, call):
    written(tmp_path / "chain")
    chain = opened(tmp_path / "chain")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(LedgerError, match="No space left"):
            chain.append({"n": 4})
    with pytest.raises(LedgerError, match="open it again"):
        chain.append({"n": 4})
    assert chain.entries == ENTRIES
    chain.close()
    with opened(tmp_path / "chain") as chain:
        assert chain.entries[:3] == ENTRIES


def test_a_really_full_disk_acknowledges_nothing_and_can_be_reopened(tmp_path):
    path = tmp_path / "chain"
    size = len(written(path))
    chain = opened(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))  # room for a part of a line
    try:
        with pytest.raises(LedgerError, match="File too large"):
            chain.append({"n": 4})
        assert path.stat().st_size == size + 50
        chain.close()
        with opened(path) as again:
            assert again.entries == ENTRIES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with opened(path) as again:
        again.append({"n": 4})


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
