"""The round before a task's: what the task says of it, read strictly, and what follows from it.

Sums are public to the cohort, so a site makes the next adapter for itself (DESIGN §3.7).
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedward.aggregation.control import next_control, split_control
from fedward.aggregation.groups import FEWEST, Group, groups_of, middle, read_dealt, read_ids
from fedward.aggregation.packing import check_mean, unpack
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import Rule
from fedward.aggregation.schemes import Vector
from fedward.aggregation.two_pass import Second
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.memory import KeptTask, SiteMemory
from fedward.errors import InvalidValue, PolicyRefusal, ProtocolError
from fedward.identity import Roster
from fedward.messages import Letter
from fedward.plan import Plan
from fedward.tuning.vector import Layout, moments_of, replace_vector, vector_of

_LOG = logging.getLogger(__name__)

Cohort = tuple[int, ...]


def read_cohorts(
    data: bytes, roster: Roster, plan: Plan, attempt: Attempt
) -> list[tuple[Group, Cohort]]:
    """The published cohorts, each with the group that it is of.

    Args:
        data: JSON: ids; or with groups the sites that were dealt, and the ids of each group that
            has a sum.
        roster: The pinned roster.
        plan: Its minimum is that of each cohort.
        attempt: The committed one.

    Raises:
        ProtocolError: It is not that.
        InvalidValue: Too few were dealt for the plan's groups, or are in the roster.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the published cohort is not JSON") from error
    asked = asked_sites(plan, roster, attempt)
    if plan.cohort.groups == 1:
        return [((), read_cohort(found, asked, plan))]
    if not isinstance(found, list) or len(found) < 1 + FEWEST:
        raise ProtocolError(f"the published cohorts are not those of {FEWEST} groups or more")
    dealt, *found = found
    groups = groups_of(plan.cohort, roster, attempt, read_dealt(dealt, asked))
    cohorts, left = list[tuple[Group, Cohort]](), iter(groups)
    for each in found:  # in the order of the groups, of which some may have no sum
        cohort = read_ids(each, asked, "published cohort")
        group = next((group for group in left if set(cohort) <= set(group)), ())
        cohorts.append((group, read_cohort(each, group, plan)))
    return cohorts


def split_sum(data: bytes, count: int) -> list[bytes]:
    """The published words of each cohort.

    Raises:
        ProtocolError: They are not alike in length.
    """
    length, rest = divmod(len(data), count)
    if rest:
        raise ProtocolError(f"{len(data)} bytes are not the sums of {count} groups")
    return [data[place * length : (place + 1) * length] for place in range(count)]


def read_cohort(found: object, known: Iterable[int], plan: Plan) -> Cohort:
    """A published cohort: known ids, ascending, at least the plan's minimum.

    Raises:
        ProtocolError: It is not that.
    """
    cohort = read_ids(found, known, "published cohort")
    if len(cohort) < plan.cohort.minimum:
        raise ProtocolError("the published cohort is smaller than the minimum")
    return cohort


def check_first(attempt: Attempt, adapter: bytes) -> None:
    """Refuse a first round that starts with moments: sites would make the next adapter of them.

    Raises:
        ProtocolError: It does.
        ModelError: The adapter is not a safetensors file.
    """
    if attempt.round == 1 and moments_of(adapter):
        raise ProtocolError("the first round starts without moments of a server optimizer")


def read_committed(data: bytes, last: Attempt) -> Attempt:
    """Which attempt at the last round was committed: this site's last one, or a later.

    Args:
        data: The attempt's number, where the round had one session; else session and number.
        last: This site's last.

    Raises:
        ProtocolError: No number, or that of an earlier attempt.
    """
    try:
        numbers = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the committed attempt is not JSON") from error
    session, number = numbers if type(numbers) is list and len(numbers) == 2 else (1, numbers)
    known = type(session) is int and type(number) is int and session >= 1 and number >= 1
    if not known or (session, number) < last.order[1:]:
        raise ProtocolError(f"attempt {last.attempt} was this site's, and no earlier one counts")
    return dataclasses.replace(last, session=session, attempt=number)


def read_basis(data: bytes) -> Vector:
    """What a second pass asks for: float32, little-endian.

    Raises:
        ProtocolError: It is not whole numbers of that type.
    """
    if len(data) % 4:
        raise ProtocolError(f"a basis of {len(data)} bytes is not float32")
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)


def read_fallback(data: bytes | None, attempt: Attempt, plan: Plan) -> tuple[int, str] | None:
    """The last round that the coordinator completed by itself, and its adapter's hex digest.

    Args:
        data: What the task says of it; None where it says nothing.
        attempt: The task's.
        plan: Must have a ``[fallback]`` for this to be said.

    Raises:
        ProtocolError: It is malformed, not of an earlier round, or the plan has no such section.
    """
    if data is None:
        return None
    try:
        number, adapter = json.loads(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("what a task says of a fallback is not a round and a digest") from error
    if plan.fallback is None or type(number) is not int or not 0 < number < attempt.round:
        raise ProtocolError("the plan has no [fallback], or not in an earlier round")
    if not isinstance(adapter, str):
        raise ProtocolError("the digest of a fallback's adapter is not text")
    return number, adapter


def read_refused(data: bytes | None, attempt: Attempt, plan: Plan) -> int:
    """The round that began with the task's adapter: its own, or the first that was refused since.

    Args:
        data: First and last of the refused rounds; None where none was.
        attempt: The task's.
        plan: Must have a ``[gate]`` for this to be said.

    Raises:
        ProtocolError: It is malformed, not up to the round before, or the plan has no such section.
    """
    if data is None:
        return attempt.round
    try:
        first, last = json.loads(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("what a task says of refused rounds is not two of them") from error
    known = type(first) is type(last) is int and 1 <= first <= last == attempt.round - 1
    if plan.gate is None or not known:
        raise ProtocolError("the plan has no [gate], or other rounds than the last were refused")
    return int(first)


def check_named(adapter: bytes, digest: str) -> bytes:
    """The adapter, if it has this hex digest.

    Raises:
        ProtocolError: It has another.
    """
    if hashlib.sha256(adapter).hexdigest() != digest:
        raise ProtocolError("the adapter is not the one that the coordinator names as its own")
    return adapter


class LastRound:
    """What a site makes of the round before a task's.

    Args:
        memory: What the site remembers of tasks and sessions.
        every_sum: The policy's: refuse where sums in between were not checked.
        note: Writes a line of the journal.
    """

    def __init__(
        self,
        *,
        memory: SiteMemory,
        every_sum: bool,
        note: Callable[[str, Mapping[str, Json]], None],
    ) -> None:
        self._memory, self._every_sum, self._note = memory, every_sum, note

    def adapter(
        self,
        letter: Letter,
        plan: Plan,
        layout: Layout,
        roster: Roster,
        fallen: tuple[int, str] | None,
    ) -> bytes:
        """The task's adapter, recomputed from the last one and the published sum.

        Where a site can do that, its task may come without the adapter. It proves the arithmetic,
        and that the cohort is the one this site signed; that the words are the session's sum only a
        comparison of transcripts between sites can show. A site that missed rounds, or was told of
        none, has nothing to recompute from: the journal says which sums it could not check. The sum
        of a refused round is not checked, because nothing came of it. The
        task hash binds all sites of a session to the same adapter.

        Args:
            letter: The task.
            plan: The approved plan.
            layout: All trainable tensors.
            roster: The pinned one.
            fallen: From :func:`read_fallback`.

        Raises:
            ProtocolError: The adapter is not what the published sum gives, or the task goes back.
            PolicyRefusal: Sums were not checked, and the policy asks for every one.
        """
        attempt, last, first = letter.attempt, self._memory.last_task(letter.attempt.run), 1
        began = read_refused(letter.parts.get("refused"), attempt, plan)
        if began < attempt.round:
            refused: Json = [began, attempt.round - 1]
            self._note("rounds refused by the gate", {"run": attempt.run, "rounds": refused})
        if last is not None:
            first = last.attempt.round
            if attempt.order < last.attempt.order:
                raise ProtocolError("this site has taken a newer task of the run")
            if began <= first:  # asked again, perhaps after a crash in the training, or refused
                if letter.parts.get("adapter", last.adapter) != last.adapter:
                    raise ProtocolError("the adapter changed between two attempts at one round")
                return last.adapter
        if fallen is not None and began == fallen[0] + 1:
            return check_named(letter.part("adapter"), fallen[1])
        if last is not None and began == first + 1:
            return self._checked(letter, plan, layout, roster, last)
        if began > first:
            missed: Json = [first, began - 1]
            _LOG.warning("round %d: sums of rounds %s were not checked", attempt.round, missed)
            self._note("sums not checked", {"run": attempt.run, "rounds": missed})
            if self._every_sum:
                reason = f"the sums of rounds {missed} were not checked, and every_sum is on"
                raise PolicyRefusal([reason])
        return letter.part("adapter")

    def _checked(
        self, letter: Letter, plan: Plan, layout: Layout, roster: Roster, then: KeptTask
    ) -> bytes:
        committed = read_committed(letter.part("attempt"), then.attempt)
        try:
            return self._recompute(letter, plan, layout, then, committed)
        except (ProtocolError, InvalidValue):
            # What this site has missed may have been made under the newer roster.
            if self._memory.cohort(committed) is not None or roster == then.roster:
                raise
        newer = dataclasses.replace(then, roster=roster)
        return self._recompute(letter, plan, layout, newer, committed)

    def _recompute(
        self, letter: Letter, plan: Plan, layout: Layout, then: KeptTask, committed: Attempt
    ) -> bytes:
        """What the adapter before and the published sum give; a task's own must be the same."""
        before, roster = then.adapter, then.roster
        cohorts = read_cohorts(letter.part("cohort"), roster, plan, committed)
        # What it signed in an attempt that came to nothing binds no attempt that it missed.
        signed = self._memory.cohort(committed)
        mine = [cohort for group, cohort in cohorts if not group or set(signed or ()) <= set(group)]
        if signed is not None and mine not in ([], [signed]):
            raise ProtocolError("the published cohort is not the one this site signed")
        rule = Rule(settings=plan.aggregation, layout=layout, attempt=committed)
        start = vector_of(before, rule.trained)  # it is there: so large is the layout
        second = None
        if rule.passes == 2:
            if not rule.again:
                raise ProtocolError("the committed session is not a second pass")
            ((_, cohort),) = cohorts
            mean = _mean(letter.part("sum"), rule, cohort, plan, roster, whole=True)
            second = Second(basis=read_basis(letter.part("basis")), mean=mean)
            rule = dataclasses.replace(
                rule, attempt=dataclasses.replace(committed, session=committed.session - 1)
            )
        totals = split_sum(letter.part("first" if second else "sum"), len(cohorts))
        mean = middle(
            [
                _mean(total, rule, cohort, plan, roster, group=group)
                for total, (group, cohort) in zip(totals, cohorts, strict=True)
            ]
        )
        if second is not None:
            rule.check_basis(mean, second.basis)
        given = letter.parts.get("adapter")
        published = None if given is None else vector_of(given, rule.trained)
        control, moments = split_control(moments_of(before))
        vector, moments = rule.accept(start, moments, mean, published, second)
        everybody = [site for _, cohort in cohorts for site in cohort]
        moments |= next_control(control, mean, plan, roster, everybody)
        expected = replace_vector(before, rule.trained, vector, moments)
        if given is not None and given != expected:
            raise ProtocolError("the adapter is not what the published sum gives")
        return expected


def _mean(
    total: bytes,
    rule: Rule,
    cohort: Cohort,
    plan: Plan,
    roster: Roster,
    *,
    group: Group = (),
    whole: bool = False,
) -> npt.NDArray[np.float64]:
    parameters = planned_session(
        plan,
        roster,
        rule.attempt,
        task_hash=bytes(32),
        dimension=rule.words,
        group=group,
        cohort=cohort if whole else (),
    )
    return published_mean(total, parameters, cohort, plan)


def published_mean(
    total: bytes, parameters: SessionParameters, cohort: Sequence[int], plan: Plan
) -> npt.NDArray[np.float64]:
    """The mean of a published sum, ``(dimension,)``.

    Raises:
        ProtocolError: It has another length, or is longer than its sites' updates can be.
    """
    if len(total) != parameters.words * parameters.grid.dtype.itemsize:
        raise ProtocolError(f"a sum of {len(total)} bytes, {parameters.words} words are due")
    mean, _ = unpack(np.frombuffer(total, dtype=parameters.grid.dtype), parameters)
    mean /= parameters.divisor(cohort)
    check_mean(mean, parameters, cohort, plan.aggregation.update_clip)
    return mean
