"""What a site takes of a task under SCAFFOLD: the shared control variate, and where to go on."""

import dataclasses
import json

import numpy as np

from fedward.aggregation.control import CONTROL, shared_control, split_control
from fedward.client.last_round import read_refused
from fedward.client.memory import SiteMemory
from fedward.errors import InvalidValue, ProtocolError
from fedward.identity import Roster
from fedward.messages import Letter
from fedward.plan import Plan
from fedward.privacy.books import Books
from fedward.tuning.vector import (
    Layout,
    Vector,
    dimension,
    moments_of,
    replace_vector,
    without_moments,
)


def for_training(adapter: bytes, plan: Plan, roster: Roster) -> bytes:
    """What of an adapter file a training needs: no moments, but the mean of control variates.

    Args:
        adapter: Safetensors bytes.
        plan: The frozen plan.
        roster: Every site whose control variate is in the sum.

    Raises:
        ModelError: Not safetensors, or a moment is not float32 or not finite.
    """
    control = split_control(moments_of(adapter))[0] if plan.rounds.scaffold else None
    bare = without_moments(adapter)
    return bare if control is None else with_control(bare, shared_control(control, plan, roster))


def adapter_sizes(plan: Plan, start: bytes, layout: Layout) -> tuple[int, ...]:
    """Bytes that :func:`for_training` may give.

    Args:
        plan: The frozen plan.
        start: An adapter of it without moments.
        layout: Names and shapes of its trainable tensors.
    """
    if not plan.rounds.scaffold:
        return (len(start),)
    return len(start), len(with_control(start, np.zeros(dimension(layout), dtype=np.float32)))


def with_control(adapter: bytes, control: Vector) -> bytes:
    """An adapter file with this control variate, ``(d,)``, as its only moment."""
    return replace_vector(adapter, (), np.zeros(0, dtype=np.float32), {CONTROL: control})


def read_counted(letter: Letter, plan: Plan, books: Books, memory: SiteMemory) -> int | None:
    """From which of its updates a site's control variate goes on: its last in a committed sum.

    Only an update that the site has charged will do: what it kept beside another would tell of
    patients what no noise is accounted for. And beside one adapter it is one update: else two sums
    over the same sites, which differ in one site's control variate, would tell it.

    Args:
        letter: The task; it names the attempt, if there was one.
        plan: The approved plan.
        books: The site's.
        memory: It has the run's last task.

    Returns:
        The update's number among those that left, 0 for none; None where the plan has no
        ``scaffold``.

    Raises:
        ProtocolError: It is malformed, not of an earlier round, or never left this site; or another
            counted beside the same adapter.
    """
    if not plan.rounds.scaffold:
        return None
    found = _counted(letter, books)
    last = memory.last_task(letter.attempt.run)
    began = read_refused(letter.parts.get("refused"), letter.attempt, plan)
    if last is not None and began <= last.attempt.round and found != last.counted:
        raise ProtocolError("another update counts than in an earlier attempt from this adapter")
    return found


def _counted(letter: Letter, books: Books) -> int:
    if "counted" not in letter.parts:
        return 0
    try:
        number, session, attempt = json.loads(letter.part("counted"))
        counted = dataclasses.replace(
            letter.attempt, round=number, session=session, attempt=attempt
        )
    except (ValueError, TypeError, RecursionError, InvalidValue) as error:
        raise ProtocolError("what a task says of a counted update is not an attempt") from error
    found = books.sent_number(counted)
    if counted.round >= letter.attempt.round or not found:
        raise ProtocolError("an update counts as summed that never left this site, or not yet")
    return found
