"""How a site becomes a member, comes by a newer roster, and leaves."""

import contextlib
import dataclasses
import ssl
import time
from typing import Literal

import httpx

from fedward.client.site_folder import SiteFolder
from fedward.enrolment import (
    ENROL_PATH,
    LEAVE_PATH,
    ROSTER_PATH,
    EnrolRequest,
    MemberRequest,
    Token,
)
from fedward.errors import ConfigurationError, IdentityError, Unreachable
from fedward.identity import Member, Roster, open_roster
from fedward.private_files import remove_durably, write_private

_SECONDS = 30.0
_ALL_SECONDS = 120.0
_ANSWER_LIMIT = 32 << 20

RosterNews = Literal["same", "adopted", "waiting"]
"""What became of an offered roster."""


def enrol(folder: SiteFolder, word: str) -> Roster:
    """Enrol with a token; the same token again, after an answer was lost, gives the same result.

    The TLS connection is trusted by the token's CA alone, and the answer must be a roster that the
    token's coordinator has signed and that names this site with its own key.

    Args:
        folder: The site's.
        word: The token as it was handed over.

    Raises:
        ConfigurationError: It is no token, another site's, or this folder belongs to another
            coordinator already.
        Unreachable: No connection, or the server is not whom the token's CA vouches for.
        IdentityError: The coordinator refuses the token, or its answer does not hold.
    """
    token, config, identity = Token.decode(word), folder.config(), folder.identity()
    if token.site != config.name:
        raise ConfigurationError(
            f"the token is for site {token.site!r}, and this is {config.name!r}: ask for a token "
            "in this name"
        )
    if config.coordinator not in (None, token.coordinator):
        raise ConfigurationError(
            f"{folder.root}: is enrolled with another coordinator ({config.address}); make another "
            "folder for this one"
        )
    request = EnrolRequest(
        site=config.name,
        public_key=identity.public_key.hex(),
        fleet_key=folder.fleet_public_key.read_text().strip(),
        secret=token.secret,
    )
    body = request.signed(identity, folder.fleet_key.read_bytes())
    sealed = _post(token.address + ENROL_PATH, body, token.ca)
    roster = open_roster(sealed, bytes.fromhex(token.coordinator))
    own_membership(folder, roster)
    write_private(folder.ca, token.ca.encode())
    if folder.roster.exists():  # enrolled before; what came is news like any other
        offer_roster(folder, sealed, automatic=False)
    else:
        write_private(folder.roster, sealed)
    folder.write_config(
        dataclasses.replace(config, address=token.address, coordinator=token.coordinator)
    )
    return pinned_roster(folder)


def own_membership(folder: SiteFolder, roster: Roster) -> Member:
    """This site's entry of a roster.

    Raises:
        IdentityError: There is none with its name and key.
    """
    name, key = folder.config().name, folder.identity().public_key
    for member in roster.members:
        if (member.name, member.public_key) == (name, key):
            return member
    raise IdentityError(
        f"the roster (epoch {roster.epoch}) does not name site {name!r} with this key: it was "
        "revoked, or never enrolled; ask the coordinator for a token"
    )


def pinned_roster(folder: SiteFolder) -> Roster:
    """The roster that this site has approved.

    Raises:
        ConfigurationError: The site is not enrolled.
        IdentityError: The file is not what the coordinator signed.
    """
    config = folder.config()
    if config.coordinator is None or not folder.roster.exists():
        raise ConfigurationError(f"{folder.root}: not enrolled yet; run fedward site enrol TOKEN")
    return open_roster(folder.roster.read_bytes(), bytes.fromhex(config.coordinator))


def waiting_roster(folder: SiteFolder) -> Roster | None:
    """The newer roster that waits for approval, if one does."""
    if not folder.pending_roster.exists():
        return None
    pinned = pinned_roster(folder)
    return open_roster(folder.pending_roster.read_bytes(), pinned.coordinator)


def fetch_roster(folder: SiteFolder) -> bytes:
    """Ask the coordinator for its current roster; what comes is not trusted yet.

    Raises:
        Unreachable: No connection, or the server is not the coordinator's.
        IdentityError: The coordinator does not know this site, or the clocks differ.
    """
    pinned_roster(folder)
    return _ask(folder, ROSTER_PATH)


def offer_roster(folder: SiteFolder, sealed: bytes, *, automatic: bool) -> RosterNews:
    """Take a roster that the coordinator offers, or keep it until somebody approves it.

    Args:
        folder: The site's.
        sealed: As :func:`fetch_roster` gave it.
        automatic: Whether the site's policy takes a newer one without asking.

    Raises:
        IdentityError: Not signed by the pinned coordinator, older than the pinned one or the one
            that waits, another one of the same epoch, without this site, or with another key for a
            name or id that is pinned.
    """
    pinned, waiting = pinned_roster(folder), waiting_roster(folder)
    offered = open_roster(sealed, pinned.coordinator)
    for known in filter(None, (pinned, waiting)):
        if offered.epoch < known.epoch:
            raise IdentityError(
                f"the offered roster has epoch {offered.epoch}, and this site knows of "
                f"{known.epoch}: a step back is refused"
            )
        if offered.epoch == known.epoch and offered != known:
            raise IdentityError(
                f"two rosters of epoch {offered.epoch} carry the coordinator's signature: it says "
                "different things to different sites; call the other sites"
            )
    own_membership(folder, offered)
    _check_continuity(pinned, offered)
    if offered == pinned:
        return "same"
    if automatic:
        _adopt(folder, sealed)
        return "adopted"
    write_private(folder.pending_roster, sealed)
    return "waiting"


def approve_roster(folder: SiteFolder) -> Roster:
    """Pin the roster that waits.

    Raises:
        ConfigurationError: None waits.
    """
    waiting = waiting_roster(folder)
    if waiting is None:
        raise ConfigurationError("no newer roster waits; fetch it with fedward site roster --fetch")
    _adopt(folder, folder.pending_roster.read_bytes())
    return waiting


def leave(folder: SiteFolder, *, tell: bool = True) -> None:
    """Tell the coordinator that this site leaves, and forget the membership.

    Roster, approvals and the coordinator's address and keys go. The site's keys, ledger and journal
    stay, because what its patients have lost counts wherever it takes part next; so do policy, data
    and models. After a crash or a lost answer the same again ends it.

    Args:
        folder: The site's; its daemon is stopped.
        tell: Whether to tell the coordinator; one that is gone for good cannot be told.

    Raises:
        ConfigurationError: Not enrolled, or the daemon runs.
        Unreachable: The coordinator could not be told; nothing has changed.
        IdentityError: The coordinator does not know this site; nothing has changed.
    """
    config = folder.config()
    if config.coordinator is None:
        raise ConfigurationError(f"{folder.root}: not enrolled, so there is nothing to leave")
    with folder.alone():
        if tell and folder.ca.exists():
            _ask(folder, LEAVE_PATH)
        for path in folder.approvals.iterdir():
            remove_durably(path)  # they must not come back for another coordinator
        for path in (folder.pending_roster, folder.roster, folder.node, folder.ca):
            path.unlink(missing_ok=True)
        folder.write_config(dataclasses.replace(config, address=None, coordinator=None))


def _ask(folder: SiteFolder, path: str) -> bytes:
    """Ask the coordinator for what this site's key alone entitles it to."""
    config = folder.config()
    body = MemberRequest.signed(
        folder.identity(),
        int(time.time()),
        path=path,
        coordinator=bytes.fromhex(config.coordinator or ""),
    )
    return _post(f"{config.address}{path}", body, folder.ca.read_text())


def _adopt(folder: SiteFolder, sealed: bytes) -> None:
    write_private(folder.roster, sealed)
    folder.pending_roster.unlink(missing_ok=True)


def _check_continuity(pinned: Roster, offered: Roster) -> None:
    """An id belongs to one name and key for ever."""
    known = {member.id: member for member in pinned.members}
    for member in offered.members:
        if known.get(member.id, member) != member:
            raise IdentityError(
                f"the offered roster gives id {member.id} of site {known[member.id].name!r} to "
                f"another name or key ({member.name!r})"
            )


def _post(url: str, body: bytes, ca: str) -> bytes:
    """Post over TLS that trusts one CA; through the environment's proxy where there is one."""
    try:
        context = ssl.create_default_context(cadata=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        answer, end = b"", time.monotonic() + _ALL_SECONDS
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(httpx.Client(verify=context, timeout=_SECONDS))
            response = stack.enter_context(client.stream("POST", url, content=body))
            if response.status_code == httpx.codes.FORBIDDEN:
                raise IdentityError(
                    f"{url}: refused; the coordinator's log says why (a token that was used, is "
                    "over or another site's; clocks that differ by more than 5 minutes)"
                )
            if response.status_code != httpx.codes.OK:
                raise Unreachable(f"{url}: answered {response.status_code}; expected 200")
            for piece in response.iter_bytes():
                answer += piece
                if len(answer) > _ANSWER_LIMIT:
                    raise IdentityError(f"{url}: the answer is larger than {_ANSWER_LIMIT} bytes")
                if time.monotonic() > end:  # a byte now and then would hold the agent for ever
                    raise Unreachable(f"{url}: no whole answer within {_ALL_SECONDS:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
        raise Unreachable(
            f"{url}: cannot be reached ({type(error).__name__}: {error}); check name, port, "
            "firewall and https_proxy, and that nobody opens the TLS on the way"
        ) from error
    return answer
