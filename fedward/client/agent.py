"""The half of a site that talks: signatures, policy, reservation, session; it never sees a record.

For each letter of the coordinator the agent gives one signed answer. What must survive a crash is
durable before the answer leaves: the reservation before training, the mark "sent" before the masked
update, the signed survivor set before its signature. The same letter again gets the same bytes.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import RecordDict

from fedward import failpoints
from fedward.aggregation.complaints import Complaint
from fedward.aggregation.groups import group_of
from fedward.aggregation.masks import Words
from fedward.aggregation.packing import pack, weighed
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.planned import planned_session, update_event
from fedward.aggregation.rules import Rule
from fedward.aggregation.schemes import Vector
from fedward.aggregation.shared_noise import add_noise_share
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.transcript import second_task_hash, task_hash
from fedward.canonical import Json
from fedward.client.approval import Consent
from fedward.client.codes import LIBRARY_ERRORS, code_of, reason_of, safe_repr
from fedward.client.journal import Journal, answer_facts, reservation_facts
from fedward.client.last_round import (
    LastRound,
    check_first,
    published_mean,
    read_basis,
    read_fallback,
)
from fedward.client.memory import KeptTask, SiteMemory
from fedward.client.narrow import narrowed, own_rank, widened
from fedward.client.policy import Policy
from fedward.client.shared_variate import for_training, read_counted
from fedward.client.training import Trainer, TrainRequest, TrainResult
from fedward.errors import (
    FedwardError,
    IdentityError,
    LedgerError,
    LedgerRolledBack,
    ProtocolError,
    SiteCode,
)
from fedward.identity import Identity, Roster
from fedward.messages import Letter, Line, Receipt, open_letter, seal_letter
from fedward.plan import from_json
from fedward.privacy.ledger import Ledger
from fedward.privacy.noise import SecureStream
from fedward.privacy.planned import metric_event
from fedward.tuning.vector import layout_from_bytes, without_moments

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the agent holds between the letters of one session; lost in a crash, by design."""

    request: TrainRequest
    result: TrainResult
    expected: SessionParameters
    session: SiteSession
    basis: Vector | None = None


class Agent:
    """One site's agent.

    Args:
        site: The site's roster id.
        identity: The site's key, the one the roster names.
        roster: The pinned roster.
        policy: The site's own limits.
        ledger: The site's privacy ledger.
        memory: What the site must remember about sessions.
        trainer: The process that holds data and model.
        consent: The policy with the site's approvals; left out, the policy alone, as simulations
            have it.
        journal: The site's audit log; simulations may do without.
        key: 32 secret bytes from which rounding derives; only tests and simulations fix it.
    """

    def __init__(
        self,
        *,
        site: int,
        identity: Identity,
        roster: Roster,
        policy: Policy,
        ledger: Ledger,
        memory: SiteMemory,
        trainer: Trainer,
        consent: Consent | None = None,
        journal: Journal | None = None,
        key: bytes | None = None,
    ) -> None:
        if roster.key(site) != identity.public_key:
            raise IdentityError(f"the key of site {site} is not the one in the roster")
        self._site, self._identity, self._roster = site, identity, roster
        self._policy, self._ledger, self._memory = policy, ledger, memory
        self._trainer, self._secret = trainer, SecureStream(key)
        self._consent, self._journal = consent or Consent(policy), journal
        self._last_round = LastRound(memory=memory, every_sum=policy.every_sum, note=self._note)
        self._work: _Work | None = None
        self._answers: dict[str, tuple[bytes, RecordDict]] = {}

    @property
    def in_hand(self) -> SessionParameters | None:
        """The session that an update is held for; None where its round is over here, or lost."""
        if (work := self._work) is None or work.session.dead:
            return None
        once_more = work.request.rule.passes == 2 and not work.request.rule.again
        return work.expected if once_more or work.session.finished is None else None

    def answer(self, records: RecordDict) -> RecordDict:
        """Answer one letter of the coordinator.

        Args:
            records: The content of a Flower message.

        Returns:
            The content of the reply: a signed letter with a code and, on success, its parts.

        Raises:
            IdentityError: The letter is not the coordinator's, or not for this site.
        """
        try:
            letter = open_letter(records, self._roster.coordinator, "coordinator")
            if letter.site != self._site:
                raise IdentityError(f"a letter for site {letter.site} came to site {self._site}")
        except IdentityError as error:
            self._note("no letter for us", {"reason": reason_of(error)})
            raise
        asked = hashlib.sha256(letter.header()).digest()
        known = self._answers.get(letter.action)
        if known is not None and known[0] == asked:
            self._note("answered again", {"action": letter.action, "asked": asked.hex()})
            return known[1]
        failpoints.hit("agent.letter")
        code, parts = self._act(letter)
        failpoints.hit("agent.acted")
        try:
            self._note("answered", answer_facts(letter, code, parts))
        except LedgerError as error:  # what is not in the journal does not leave
            _LOG.warning("round %d: %s", letter.attempt.round, error)
            code, parts = code_of(error), {}
        failpoints.hit("agent.answered")
        reply = Letter(
            action=letter.action,
            attempt=letter.attempt,
            site=self._site,
            code=code,
            parts=parts,
            lines=self._lines(letter.receipt),
        )
        sealed = seal_letter(reply, self._identity, "site")
        if code in {SiteCode.READY, SiteCode.DONE}:
            self._answers[letter.action] = (asked, sealed)
        return sealed

    def _act(self, letter: Letter) -> tuple[SiteCode, Mapping[str, bytes]]:
        """Do what a letter asks; an error becomes a code, its text stays in the site's log."""
        try:
            self._check_receipt(letter)
            if letter.action == "task":
                return self._task(letter), {}
            if letter.action == "second":
                return self._second(letter), {}
            if letter.action == "evaluate":
                return self._evaluate(letter), {}
            return SiteCode.DONE, self._exchange(letter)
        except (FedwardError, *LIBRARY_ERRORS) as error:
            words = str(error) if isinstance(error, FedwardError) else safe_repr(error)
            _LOG.warning("round %d: %s: %s", letter.attempt.round, letter.action, words)
            # A complaint is about another site's envelope, and says nothing of this one's records.
            parts = {"complaint": error.message} if isinstance(error, Complaint) else {}
            return self._refuse(letter, error), parts

    def _refuse(self, letter: Letter, error: Exception) -> SiteCode:
        """The code of an error, whose words stay in the site's journal."""
        try:
            self._note("refused", {"action": letter.action, "reason": reason_of(error)})
        except LedgerError as broken:
            return code_of(broken)
        return code_of(error)

    def _note(self, what: str, facts: Mapping[str, Json]) -> None:
        if self._journal is not None:
            self._journal.record(what, facts)

    def _check_receipt(self, letter: Letter) -> None:
        """Refuse to go on with a ledger that is behind what the coordinator has seen of it."""
        receipt = letter.receipt
        if receipt is None:
            return
        head = self._ledger.line(receipt.seq)
        try:
            receipt.check(self._roster.coordinator, self._identity.public_key, head)
        except IdentityError as error:
            raise LedgerRolledBack(
                f"line {receipt.seq} of the ledger is not the one that the coordinator has seen: "
                "the disk was rolled back and written on; restore the newest copy"
            ) from error
        if letter.action in {"task", "consistency"}:  # the first letters after one was sent
            self._memory.keep_receipt(receipt)

    def _lines(self, receipt: Receipt | None) -> tuple[Line, ...]:
        """What an answer tells of the ledger: salted hashes, and numbers that count letters."""
        head = self._ledger.head
        asked = receipt.seq if receipt is not None else 0
        lines = [(asked, self._ledger.line(asked))] if 0 < asked < head[0] else []
        return (*lines, head) if head[0] else ()

    def _task(self, letter: Letter) -> SiteCode:
        """Check the task, reserve its cost, train; the update waits here for its session."""
        attempt, plan = letter.attempt, from_json(letter.part("plan"))
        layout = layout_from_bytes(letter.part("layout"))
        newest = self._memory.newest(attempt.run)
        if newest is not None and attempt.order <= newest:
            return SiteCode.REFUSED_STALE
        approval = self._consent.check(plan)
        fallen = read_fallback(letter.parts.get("fallback"), attempt, plan)
        if fallen is not None:  # what no site can recompute is approved like a new plan
            self._consent.check(plan.after_fallback(fallen[1]))
        if attempt.round > plan.rounds.count:
            raise ProtocolError(f"round {attempt.round} of a plan with {plan.rounds.count}")
        if Rule(settings=plan.aggregation, layout=layout, attempt=attempt).again:
            raise ProtocolError("a second pass has the update of the first, and no task")
        group = group_of(plan, self._roster, attempt, letter.parts.get("dealt", b""), self._site)
        adapter = self._last_round.adapter(letter, plan, layout, self._roster, fallen)
        check_first(attempt, adapter)
        counted = read_counted(letter, plan, self._ledger, self._memory)
        request = TrainRequest(
            plan=plan,
            attempt=attempt,
            draw=self._ledger.spent_in(attempt),
            adapter=for_training(adapter, plan, self._roster),
            layout=layout,
            spent=self._ledger.spent(attempt.run),
            counted=counted,
        )
        rank = own_rank(plan, self._roster.member(self._site).name)
        asked = narrowed(request, rank)
        # Before anything is as large as the layout says, and the ledger commits a run to this plan.
        self._trainer.prepare(asked)
        failpoints.hit("agent.prepared")
        expected = planned_session(
            plan,
            self._roster,
            attempt,
            task_hash=task_hash(adapter, plan.hash(), plan.aggregation.scheme),
            dimension=request.rule.words,
            group=group,
        )
        kept = KeptTask(attempt=attempt, adapter=adapter, roster=self._roster, counted=counted)
        self._memory.keep_task(kept)
        failpoints.hit("agent.kept")
        self._ledger.open_run(
            attempt.run,
            plan.hash(),
            update_event(plan, expected),
            plan.rounds.count + plan.rounds.spare,
            metrics=metric_event(plan),
        )
        failpoints.hit("agent.opened")
        self._note("reserved", reservation_facts(plan, attempt, self._policy, approval))
        self._ledger.reserve(attempt, journal=self._journal.head if self._journal else None)
        failpoints.hit("agent.reserved")
        held = self._held(request)
        if held is None:  # no update leaves once another has been trained, perhaps to no end
            self._work = None
        result = held or widened(self._trainer.train(asked), request, rank)
        failpoints.hit("agent.trained")
        session = self._session(expected)
        self._work = _Work(request=request, result=result, expected=expected, session=session)
        self._answers.clear()
        return SiteCode.READY

    def _session(self, expected: SessionParameters) -> SiteSession:
        return SiteSession(
            identity=self._identity,
            site=self._site,
            roster=self._roster,
            limits=Limits(
                colluders=self._policy.colluders,
                minimum=self._policy.minimum,
                sites=len(self._roster.members),
            ),
            memory=self._memory,
            expected=expected,
        )

    def _second(self, letter: Letter) -> SiteCode:
        """Enter the second pass of a round, with the update and over the very sites of the first.

        The update leaves its first session here, whatever comes of the letter: it gets into no
        other first pass, and into no second one but this. After a crash it is gone, and the round
        with it; the reservation is spent since the first pass.
        """
        work = self._work
        first = None if work is None else work.request.attempt
        if work is None or first is None or work.request.rule.passes != 2:
            raise ProtocolError("no update of a first pass is held here: it needs a task first")
        if letter.attempt != dataclasses.replace(first, session=first.session + 1):
            raise ProtocolError("this is not the second pass of the attempt that is held here")
        self._work, outcome = None, work.session.finished
        if outcome is None or work.request.rule.again:
            raise ProtocolError("the first pass has not ended in a sum that this site certified")
        total, data = letter.part("sum"), letter.part("basis")
        plan, cohort = work.request.plan, outcome.survivors
        mean = published_mean(total, work.expected, cohort, plan)
        basis = read_basis(data)
        work.request.rule.check_basis(mean, basis)
        request = dataclasses.replace(work.request, attempt=letter.attempt)
        expected = planned_session(
            plan,
            self._roster,
            letter.attempt,
            task_hash=second_task_hash(work.expected.task_hash, outcome, total, data),
            dimension=request.rule.words,
            cohort=cohort,
        )
        self._work = _Work(
            request=request,
            result=dataclasses.replace(work.result, slots=np.zeros(0)),
            expected=expected,
            session=self._session(expected),
            basis=basis,
        )
        self._answers.clear()
        return SiteCode.READY

    def _held(self, request: TrainRequest) -> TrainResult | None:
        """The update of an aborted attempt at the same session, if nothing of it has left."""
        work, now = self._work, request.attempt
        if work is None:
            return None
        then = work.request.attempt
        same = (then.run, then.round, then.session) == (now.run, now.round, now.session)
        return work.result if same and work.request.draw == request.draw else None

    def _exchange(self, letter: Letter) -> Mapping[str, bytes]:
        """One exchange of the session that the last task opened."""
        work, message = self._work, letter.part("message")
        if work is None or work.request.attempt != letter.attempt:
            raise ProtocolError("no session is open for this attempt: it needs a task first")
        session = work.session
        if letter.action == "masked":
            header, words = session.masked(message, self._words(work))
            return {"message": header, "words": words.tobytes()}
        steps = {
            "hello": session.hello,
            "shares": session.shares,
            "consistency": session.consistency,
            "unmask": session.unmask,
        }
        return {"message": steps[letter.action](message)}

    def _words(self, work: _Work) -> Words:
        """The update on the grid: clipped as a whole, rounded by the site's own secret stream.

        In ``pooled`` mode with its share of the noise, of another stream.
        """
        request = work.request
        update = request.rule.to_send(work.result.update, work.basis)
        attempt = request.attempt  # its number does not count: the same update is rounded alike
        position = f"{attempt.round}/{attempt.session}/{request.draw}"
        place = (attempt.run, position, work.expected.task_hash)
        weighted = weighed(update, work.expected, self._site)
        stream = self._secret.child("rounding", *place)
        words = pack(weighted, work.result.slots, work.expected, stream)
        if work.expected.noise:
            add_noise_share(words, work.expected, self._secret.child("noise share", *place))
        return words

    def _evaluate(self, letter: Letter) -> SiteCode:
        """Evaluate an adapter for the site itself, under the plan that its ledger knows.

        The answer is always the same: how it went would be an exact statement about patients.
        """
        plan, attempt = from_json(letter.part("plan")), letter.attempt
        if self._ledger.plan_of(attempt.run) != plan.hash():
            return SiteCode.REFUSED_PLAN
        try:
            adapter = without_moments(letter.part("adapter"))
            metrics = self._trainer.evaluate(plan, adapter, attempt.run)
        except (FedwardError, *LIBRARY_ERRORS) as error:
            _LOG.warning("round %d: no evaluation: %s", attempt.round, safe_repr(error))
        else:
            _LOG.info("round %d: loss %.4f on own held-out records", attempt.round, metrics.loss)
        return SiteCode.DONE
