"""Asking the sites of a run, and sessions of secure aggregation over their answers.

What a round asks for and what becomes of the sums is the engine's (:mod:`fedward.server.rounds`). A
site that is late, silent or wrong is left out and recorded; too few sites end a session.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
from flwr.serverapp import Grid

from fedward import failpoints
from fedward.aggregation.masks import Words
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.published import SumResult
from fedward.aggregation.tally import Tally
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.errors import IdentityError, LedgerRolledBack, ProtocolError, SiteCode
from fedward.identity import Identity, Roster
from fedward.messages import MESSAGE_TYPES, Letter, open_letter, seal_letters
from fedward.server.anchors import Anchors
from fedward.server.replies import Clock, collect
from fedward.server.store import EVERYBODY, Phase, RunStore
from fedward.server.suspects import blame, joined

Observer = Callable[[Attempt, Phase, int, Json], None]
"""Told of every event after it is durable: attempt, phase, site (or EVERYBODY), facts."""

SILENT = "no answer"
"""Why a site is left out that said nothing."""


class Sessions:
    """The coordinator's end of every letter of one run.

    Args:
        identity: The coordinator's key.
        roster: The member sites.
        nodes: Site id → Flower node id.
        store: Where events are kept.
        observer: Told of every event.
        clock: What deadlines are measured by.
        deadline: Seconds that one exchange may take.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        roster: Roster,
        nodes: Mapping[int, int],
        store: RunStore,
        observer: Observer,
        clock: Clock,
        deadline: int,
    ) -> None:
        self._identity, self._roster, self._nodes = identity, roster, dict(nodes)
        self._store, self._observer = store, observer
        self._clock, self._deadline = clock, deadline
        self._anchors = Anchors(identity, roster, store)
        self._left_out = set[tuple[Attempt, int]]()
        self._tally: Tally | None = None
        self._silent, self._before = frozenset[int](), list[dict[str, Json]]()

    def forget(self) -> None:
        """Begin an attempt: what the sessions before showed of their sites is recorded already."""
        self._tally, self._silent, self._before = None, frozenset(), []

    def run(self, grid: Grid, parameters: SessionParameters, sites: Collection[int]) -> SumResult:
        """One execution of the protocol among sites that hold their input, to the sum.

        Raises:
            CohortTooSmall: Too few sites are left.
            ProtocolError: A site's fault that ends the session.
        """
        tally = self._tally = Tally(parameters=parameters, roster=self._roster)
        todo = dict.fromkeys(sites, tally.request())
        for action, phase, add, close in (
            ("hello", Phase.KEYS, tally.add_hello, tally.close_hellos),
            ("shares", Phase.SHARED, tally.add_shares, tally.close_shares),
            ("masked", Phase.MASKED, tally.add_masked, tally.close_masked),
            ("consistency", Phase.CONSISTENT, tally.add_consistency, tally.close_consistency),
        ):
            self._exchange(grid, parameters, action, phase, todo, add)
            todo = close()
            failpoints.hit("round.closed")
        self._exchange(grid, parameters, "unmask", Phase.UNMASKED, todo, tally.add_unmask)
        return tally.result()

    def ask(
        self, grid: Grid, attempt: Attempt, action: str, todo: Mapping[int, Mapping[str, bytes]]
    ) -> tuple[dict[int, Letter], dict[int, str]]:
        """Send each site its parts; collect signed replies until the deadline.

        Returns:
            The letters of sites that did as asked, and for every other site why it is left out.
        """
        nodes = {self._nodes[site]: site for site in todo}
        letters = [
            Letter(
                action=action,
                attempt=attempt,
                site=site,
                parts=parts,
                receipt=self._anchors.receipt(site),
            )
            for site, parts in todo.items()
        ]
        messages = [
            grid.create_message(
                content=content,
                message_type=MESSAGE_TYPES[action],
                dst_node_id=self._nodes[site],
                group_id=str(attempt.round),
            )
            for site, content in zip(
                todo, seal_letters(letters, self._identity, "coordinator"), strict=True
            )
        ]
        accepted, refused = dict[int, Letter](), dict.fromkeys(todo, SILENT)
        failpoints.hit("round.asked")
        found = collect(grid, messages, self._deadline, self._clock)
        failpoints.hit("round.answered")
        for message in found:
            site = nodes.get(message.metadata.src_node_id)
            if site is None or message.has_error():
                continue
            try:
                letter = open_letter(message.content, self._roster.key(site), "site")
                if (letter.site, letter.attempt, letter.action) != (site, attempt, action):
                    refused[site] = "answered another letter"
                elif letter.code not in {SiteCode.READY, SiteCode.DONE}:
                    refused[site] = self._refusal(letter)
                else:
                    self._anchors.check(site, letter.lines)
                    accepted[site] = letter
                    refused.pop(site, None)
            except (IdentityError, LedgerRolledBack) as error:
                refused[site] = str(error)
        for site, reason in refused.items():
            self._leave_out(attempt, site, action, reason)
        return accepted, refused

    def ready(self, attempt: Attempt, letters: Mapping[int, Letter]) -> None:
        """Record who has trained, with the line that its ledger has reached."""
        for site, letter in letters.items():
            self.record(attempt, Phase.READY, self._anchors.learn(letter), site=site)

    def record(
        self, attempt: Attempt, phase: Phase, facts: Json = None, *, site: int = EVERYBODY
    ) -> None:
        """Make an event durable, then tell the observer."""
        self._store.record(attempt, phase, facts, site=site)
        self._observer(attempt, phase, site, facts)

    def end(self, error: Exception | None = None, missing: Iterable[int] = ()) -> None:
        """Keep what a session showed of its sites, where the attempt goes on with another one.

        Args:
            error: Why it came to no sum; None if it did.
            missing: Sites that never came to it.
        """
        silent = self._silent.union(missing)
        self._before.append(blame(self._suspects().values(), silent, error))
        self._tally, self._silent = None, frozenset()

    def blame(self, error: Exception | None = None) -> dict[str, Json]:
        """What the attempt's sessions showed of their sites, for the event that ends it."""
        return joined([*self._before, blame(self._suspects().values(), self._silent, error)])

    def _exchange(
        self,
        grid: Grid,
        parameters: SessionParameters,
        action: str,
        phase: Phase,
        todo: Mapping[int, bytes],
        add: Callable[..., None],
    ) -> None:
        """One exchange of the session: a message to each site, every good answer to the tally."""
        attempt = parameters.attempt
        letters, _ = self.ask(grid, attempt, action, {s: {"message": m} for s, m in todo.items()})
        silent = set(todo) - set(self._suspects())
        for site, letter in sorted(letters.items()):
            try:
                if action == "masked":
                    words = _words(letter.part("words"), parameters.grid.dtype)
                    add(site, letter.part("message"), words)
                else:
                    add(site, letter.part("message"))
            except (ProtocolError, IdentityError) as error:
                self._leave_out(attempt, site, action, str(error))
            else:
                silent.discard(site)
                facts = self._anchors.learn(letter) if phase is Phase.MASKED else None
                self.record(attempt, phase, facts, site=site)
        # Where nobody answers, the fault is here or in the network, and no site's.
        self._silent = frozenset(silent) if letters else frozenset()

    def _suspects(self) -> Mapping[int, frozenset[int]]:
        """What the complaints of the last session come to, by the site that complained."""
        return self._tally.suspects if self._tally else {}

    def _refusal(self, letter: Letter) -> str:
        """Why a site did not do as asked: its code, and what its complaint comes to."""
        if self._tally is None or letter.action != "masked" or "complaint" not in letter.parts:
            return str(letter.code)
        try:
            suspects = self._tally.add_complaint(letter.site, letter.parts["complaint"])
        except ProtocolError as error:
            return f"{letter.code}: {error}"
        return f"{letter.code}: at fault is " + " or ".join(f"site {s}" for s in sorted(suspects))

    def _leave_out(self, attempt: Attempt, site: int, action: str, reason: str) -> None:
        """Record why a site is out of an attempt: the first reason is the one that counts.

        A survivor whose vote is missing is asked for its shares all the same, and may fail again.
        """
        if (attempt, site) in self._left_out:
            return
        self._left_out.add((attempt, site))
        self.record(attempt, Phase.LEFT_OUT, {"at": action, "reason": reason}, site=site)


def _words(data: bytes, word: np.dtype[np.unsignedinteger]) -> Words:
    """The words of a masked vector, as the site sent them: little-endian."""
    if len(data) % word.itemsize:
        raise ProtocolError(f"{len(data)} bytes are not whole words")
    return np.frombuffer(data, dtype=word.newbyteorder("<"))
