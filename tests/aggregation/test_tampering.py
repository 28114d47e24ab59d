"""Any change of any message to a site ends its session; nothing but one kind of error comes out."""

import copy
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.aggregation.session_memory import VolatileMemory
from fedward.errors import ProtocolError
from tests.aggregation.attacker import VICTIM, deliver
from tests.aggregation.rig import STAGES, Rig, make_rig


@functools.cache
def before(stage: str) -> tuple[Rig, bytes]:
    """A session just before an exchange, and the victim's honest message."""
    rig = make_rig(5, gone={5: "R2"}, secrets=f"tampering {stage}")
    return rig, rig.run_to(stage)[VICTIM]


def try_it(stage: str, message: bytes) -> bool:
    """Whether a copy of the victim answers; it must be dead if it does not."""
    rig, _ = before(stage)
    trial = copy.copy(rig)
    session = copy.copy(rig.sessions[VICTIM])
    session._memory = VolatileMemory()
    trial.sessions = {VICTIM: session}
    try:
        deliver(trial, stage, message)
    except ProtocolError:
        assert session.dead
        return False
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_the_honest_message_is_answered(stage):
    """Control: the copies are alive."""
    assert try_it(stage, before(stage)[1])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STAGES), st.integers(0, 2**20), st.integers(0, 7))
def test_every_bit_counts(stage, place, bit):
    message = bytearray(before(stage)[1])
    message[place % len(message)] ^= 1 << bit
    assert not try_it(stage, bytes(message))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(STAGES), st.integers(0, 2**20), st.integers(0, 300), st.binary(max_size=300))
def test_cut_spliced_or_replaced(stage, place, length, put):
    honest = before(stage)[1]
    start = place % (len(honest) + 1)
    message = honest[:start] + put + honest[start + length :]
    # Survivors and certificate without one whole entry are other messages, but possible ones.
    possible = stage in ("R3", "R4") and (len(honest) - len(message)) in (68, 100)
    assert try_it(stage, message) == (message == honest) or (possible and not put)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(STAGES), st.sampled_from(STAGES))
def test_messages_of_another_exchange(stage, other):
    assert try_it(stage, before(other)[1]) == (stage == other)
