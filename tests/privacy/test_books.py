"""What a ledger can tell: its room, what shared noise is worth alone; and to any reader."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedward.attempt import Attempt
from fedward.errors import BudgetExceeded, LedgerError
from fedward.identity import Identity
from fedward.privacy import distributed
from fedward.privacy.accounting import SampledGaussian, epsilon, merged, renyi_epsilon
from fedward.privacy.distributed import SharedGaussian
from fedward.privacy.ledger import Ledger, read_books

KEY = Identity(bytes(32))
PLAN = b"p" * 32
DELTA = 1e-6
LOCAL = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.05, steps=10)
POOLED = SharedGaussian(
    clip=1.0, grid_step=1e-4, dimension=100, share=0.5, shares=4, sampling_rate=0.05, steps=10
)


@pytest.fixture
def ledger(tmp_path):
    with_cap = Ledger.open(tmp_path / "ledger", KEY, epsilon=6.0, delta=DELTA)
    yield with_cap
    with_cap.close()


def spend(ledger: Ledger, run: str, rounds: int) -> None:
    for number in range(1, rounds + 1):
        ledger.reserve(Attempt(run=run, round=number))
        ledger.mark_sent(Attempt(run=run, round=number))


@pytest.mark.parametrize("event", [LOCAL, POOLED], ids=["local", "pooled"])
@pytest.mark.parametrize("before", ["nothing", "an open run", "a closed run", "a pooled run"])
def test_room_is_exactly_what_is_admitted(ledger, event, before):
    if before != "nothing":
        ledger.open_run("before", PLAN, POOLED if "pooled" in before else LOCAL, 8)
        spend(ledger, "before", 3)
    if before == "a closed run":
        ledger.close_run("before")
    room = ledger.room([event], most=60)
    assert 2 < room < 60
    assert ledger.room([event], most=2) == 2
    with pytest.raises(BudgetExceeded):
        ledger.open_run("new", PLAN, event, room + 1)
    ledger.open_run("new", PLAN, event, room)
    assert ledger.room([event], most=60) == 0


def test_updates_that_left_are_numbered_and_no_others(ledger):
    ledger.open_run("one", PLAN, LOCAL, 8)
    lost, first, second = (Attempt(run="one", round=1, attempt=n) for n in (1, 2, 3))
    for attempt in (lost, first, second):
        ledger.reserve(attempt)  # takes over from the one before
        if attempt is not lost:
            ledger.mark_sent(attempt)
    spent = Attempt(run="one", round=2)
    ledger.reserve(spent)
    found = [ledger.sent_number(each) for each in (lost, first, second, spent)]
    assert found == [0, 1, 2, 0]
    assert ledger.sent_number(dataclasses.replace(first, run="two")) == 0


def test_an_open_run_leaves_less_room_than_what_it_has_spent(ledger):
    ledger.open_run("one", PLAN, LOCAL, 8)
    spend(ledger, "one", 3)
    assert ledger.epsilon_committed() == epsilon([LOCAL.times(8)], DELTA) > ledger.epsilon_spent()
    held = ledger.room([LOCAL])
    ledger.close_run("one")
    assert ledger.epsilon_committed() == ledger.epsilon_spent()
    assert held < ledger.room([LOCAL])
    ledger.open_run("two", PLAN, LOCAL, 4)
    assert ledger.epsilon_committed() == renyi_epsilon([LOCAL.times(7)], DELTA)


def test_a_pooled_run_tells_what_the_sites_own_noise_gives(ledger, tmp_path):
    ledger.open_run("pooled", PLAN, POOLED, 5)
    spend(ledger, "pooled", 5)
    own = dataclasses.replace(POOLED, shares=1)
    assert ledger.events() == (POOLED.times(5),)
    assert ledger.epsilon_spent() < 1.02 * distributed.epsilon([POOLED.times(5)], DELTA)
    assert ledger.epsilon_spent() < 6 < ledger.epsilon_alone()
    assert ledger.epsilon_alone() == renyi_epsilon([own.times(5)], DELTA)
    ledger.close()
    entry = json.loads((tmp_path / "ledger").read_text().splitlines()[0])["entry"]
    assert entry["events"] == [dataclasses.asdict(POOLED)]
    with_cap = Ledger.open(tmp_path / "ledger", KEY, epsilon=6.0, delta=DELTA)
    assert with_cap.events() == (POOLED.times(5),)
    assert with_cap.epsilon_alone() == renyi_epsilon([own.times(5)], DELTA)
    with_cap.close()


def test_in_local_mode_all_noise_is_the_sites_own(ledger):
    ledger.open_run("run", PLAN, LOCAL, 5)
    spend(ledger, "run", 5)
    assert ledger.epsilon_alone() == ledger.epsilon_spent() > 0


def test_runs_of_both_modes_share_one_budget(ledger):
    """An upper bound at whole orders: never below what PRV says of the continuous counterpart."""
    ledger.open_run("local", PLAN, LOCAL, 4)
    spend(ledger, "local", 4)
    ledger.open_run("pooled", PLAN, POOLED, 4)
    spend(ledger, "pooled", 4)
    assert ledger.events() == merged([LOCAL.times(4), POOLED.times(4)])
    continuous = SampledGaussian(
        noise_multiplier=POOLED.noise_multiplier, sampling_rate=0.05, steps=40
    )
    assert epsilon([LOCAL.times(4), continuous], DELTA) < ledger.epsilon_spent() <= 6.0


def test_a_search_is_charged_like_any_other_use(ledger):
    """Hyper-parameters, objectives and data versions are other plans over the same patients."""
    number = 0
    for number in range(100):
        try:
            ledger.open_run(f"trial-{number}", bytes([number]) * 32, LOCAL, 3)
        except BudgetExceeded:
            break
        spend(ledger, f"trial-{number}", 3)
    assert 1 < number < 10
    assert sum(ledger.spent(run) for run in ledger.runs) == 3 * number
    assert ledger.epsilon_spent() == renyi_epsilon([LOCAL.times(3 * number)], DELTA) <= 6.0


def read(path: Path, key: Identity = KEY) -> tuple[int, float]:
    books = read_books(path, key.public_key, epsilon=6.0, delta=DELTA)
    return len(books.runs), books.epsilon_spent()


def test_anybody_may_read_the_books_while_the_site_writes(ledger, tmp_path):
    path = tmp_path / "ledger"
    assert read(path) == (0, 0.0)
    ledger.open_run("run", PLAN, LOCAL, 5)
    spend(ledger, "run", 2)
    assert read(path) == (1, ledger.epsilon_spent())
    path.write_bytes(path.read_bytes() + b'{"half a li')
    assert read(path) == (1, ledger.epsilon_spent())
    with pytest.raises(LedgerError, match="line 1 was not signed"):
        read(path, Identity(b"x" * 32))
    with pytest.raises(LedgerError, match="No such file"):
        read(tmp_path / "none")


def lines_of(ledger: Ledger, path: Path) -> list[bytes]:
    ledger.open_run("run", PLAN, LOCAL, 5)
    spend(ledger, "run", 2)
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [*lines[:2], *lines[3:]], 3),  # one is gone
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4),  # one is there twice
        (lambda lines: [*lines, lines[-1]], 6),  # the last is there twice
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),  # two are swapped
        (lambda lines: lines[1:], 1),  # the first is gone
        (lambda lines: [*lines[:4], lines[4].replace(b'"sent"', b'"open"')], 5),
        (lambda lines: [lines[0].replace(b'"reservations":5', b'"reservations":9'), *lines], 1),
        (lambda lines: [*lines[:2], lines[2][:40] + b"\n", *lines[3:]], 3),  # one is cut short
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3),
    ],
)
def test_a_changed_ledger_is_refused_with_the_number_of_the_line(ledger, tmp_path, change, line):
    path = tmp_path / "ledger"
    lines = lines_of(ledger, path)
    Ledger.open(path, KEY, epsilon=6.0, delta=DELTA).close()  # control
    path.write_bytes(b"".join(change(lines)))
    changed = path.read_bytes()
    with pytest.raises(LedgerError, match=f"line {line} "):
        Ledger.open(path, KEY, epsilon=6.0, delta=DELTA)
    with pytest.raises(LedgerError, match=f"line {line} "):
        read(path)
    assert path.read_bytes() == changed, "what is wrong stays there to be looked at"


@pytest.mark.parametrize("kept", range(5))
def test_a_ledger_cut_at_a_line_is_refused_by_its_anchor(ledger, tmp_path, kept):
    path = tmp_path / "ledger"
    lines = lines_of(ledger, path)
    anchor = (5, json.loads(lines[4])["h"])
    path.write_bytes(b"".join(lines[:kept]))
    cut = Ledger.open(path, KEY, epsilon=6.0, delta=DELTA)
    with pytest.raises(LedgerError, match=f"line {kept + 1} is missing"):
        cut.check_anchor(*anchor)
    cut.close()
