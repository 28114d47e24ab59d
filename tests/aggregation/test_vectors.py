"""Known answers from the independent reference, and what must fail."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedward.aggregation import shamir, wire
from fedward.aggregation.cohort import Cohort, PinnedKeys, form_cohort
from fedward.aggregation.complaints import Complaint, judge
from fedward.aggregation.envelopes import agree
from fedward.aggregation.masks import BLOCK_WORDS, apply_masks
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import SiteFault, envelope_context, envelope_key, kdf
from fedward.canonical import digest
from fedward.errors import ProtocolError
from fedward.identity import Identity, Member, Roster
from tests.aggregation import make_vectors, reference
from tests.aggregation.make_vectors import secret

VECTORS = Path(__file__).parent / "vectors"
PRIMITIVES = json.loads((VECTORS / "primitives.json").read_text())
SESSION = json.loads((VECTORS / "session.json").read_text())
REFUSED = json.loads((VECTORS / "refused.json").read_text())
COMPLAINTS = json.loads((VECTORS / "complaints.json").read_text())


def replay(draws: list[str]) -> Callable[[int], bytes]:
    """A source of secrets that gives the vector's bytes, in order, in the sizes asked for."""
    queue = [bytes.fromhex(draw) for draw in draws]

    def source(size: int) -> bytes:
        value = queue.pop(0)
        assert len(value) == size
        return value

    return source


def test_the_files_are_what_the_reference_writes():
    for name, value in make_vectors.all_vectors().items():
        written = json.loads((VECTORS / f"{name}.json").read_text())
        assert json.loads(json.dumps(value)) == written, name


def test_digest():
    for case in PRIMITIVES["h"]:
        assert digest(*map(bytes.fromhex, case["fields"])).hex() == case["digest"]


def test_kdf():
    for case in PRIMITIVES["kdf"]:
        fields = map(bytes.fromhex, case["fields"])
        key = kdf(bytes.fromhex(case["secret"]), bytes.fromhex(case["salt"]), *fields)
        assert key.hex() == case["key"]


@pytest.mark.parametrize("mode", ["gcm", "ctr"])
def test_stream(mode):
    for case in PRIMITIVES["stream"]:
        words = np.zeros(len(case["words"]), dtype=f"<u{case['word_bytes']}")
        apply_masks(words, add=[bytes.fromhex(case["key"])], mode=mode)
        assert words.tolist() == case["words"]


@pytest.mark.parametrize("mode", ["gcm", "ctr"])
def test_stream_across_blocks(mode):
    case = PRIMITIVES["stream_across_blocks"]
    words = np.zeros(BLOCK_WORDS + 4, dtype="<u4")
    apply_masks(words, add=[bytes.fromhex(case["key"])], mode=mode)
    firsts = {"0": words[:4], "1": words[BLOCK_WORDS:]}
    assert {k: v.tobytes().hex() for k, v in firsts.items()} == case["first_16_bytes_of_block"]
    assert hashlib.sha256(words[:BLOCK_WORDS].data).hexdigest() == case["sha256_of_block_0"]


def test_envelope():
    case = PRIMITIVES["envelope"]
    session, dealer, holder = bytes.fromhex(case["session"]), case["dealer"], case["holder"]
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(case["private"]))
    shared = agree(private, holder, bytes.fromhex(case["public"]))
    cipher = AESGCM(envelope_key(shared, session, dealer, holder))
    context = envelope_context(session, dealer, holder)
    sealed = cipher.encrypt(bytes(12), bytes.fromhex(case["plain"]), context)
    assert sealed.hex() == case["sealed"]


def test_shamir():
    for case in PRIMITIVES["shamir"]:
        value = bytes.fromhex(case["secret"])
        shares = shamir.split(
            value, threshold=case["threshold"], holders=5, secrets=replay(case["draws"])
        )
        assert [share.hex() for share in shares] == case["shares"]
        for chosen in ((1, 2, 3), (3, 4, 5), (1, 3, 5), (1, 2, 3, 4, 5)):
            assert shamir.join({x: shares[x - 1] for x in chosen}, 3) == value


def vector_sites() -> tuple[dict[int, Any], Roster, SessionParameters, dict[int, SiteSession]]:
    """The vector's three sites, as sessions that draw the vector's secrets."""
    rows = {int(n): row for n, row in SESSION["sites"].items()}
    identities = {n: Identity(bytes.fromhex(row["identity"])) for n, row in rows.items()}
    members = tuple(
        Member(id=n, name=f"site {n}", public_key=key.public_key)
        for n, key in sorted(identities.items())
    )
    coordinator = Identity(secret("coordinator")).public_key
    roster = Roster(epoch=1, coordinator=coordinator, members=members)
    parameters = SessionParameters.from_bytes(SESSION["parameters"].encode())
    sessions = {
        n: SiteSession(
            identity=identities[n],
            site=n,
            roster=roster,
            limits=Limits(),
            memory=VolatileMemory(),
            expected=parameters,
            secrets=replay(row["draws"]),
        )
        for n, row in rows.items()
    }
    return rows, roster, parameters, sessions


def test_a_whole_session_byte_for_byte():
    rows, roster, parameters, sessions = vector_sites()
    tally = Tally(parameters=parameters, roster=roster)
    for n, session in sessions.items():
        reply = session.hello(tally.request())
        assert reply[4:].hex() == rows[n]["hello"]
        tally.add_hello(n, reply)
    for n, message in tally.close_hellos().items():
        reply = sessions[n].shares(message)
        assert reply[4:].hex() == rows[n]["shares"]
        tally.add_shares(n, reply)
    for n, message in tally.close_shares().items():
        words = np.array(rows[n]["input"], dtype=np.uint32)
        reply, vector = sessions[n].masked(message, words)
        assert (reply[4:].hex(), vector.tobytes().hex()) == (rows[n]["header"], rows[n]["masked"])
        tally.add_masked(n, reply, vector)
    for n, message in tally.close_masked().items():
        reply = sessions[n].consistency(message)
        assert reply[4:].hex() == rows[n]["vote"]
        tally.add_consistency(n, reply)
    for n, message in tally.close_consistency().items():
        tally.add_unmask(n, sessions[n].unmask(message))
    result = tally.result()
    assert result.words.tolist() == SESSION["sum"]
    assert result.outcome.session.hex() == SESSION["sid"]
    assert result.outcome.survivors_hash.hex() == SESSION["u3"]


@pytest.mark.parametrize("field", ["sid", "u3", "sum"])
def test_the_vector_would_notice(field):
    """Negative control: each public fact of the vector depends on every site's input or keys."""
    sites = make_vectors.three_sites()
    sites[7]["input"][0] += 1
    sites[7]["nonce"] = bytes(32)
    changed = reference.transcript(SESSION["parameters"].encode(), sites, 4)
    total = [sum(c) % 2**32 for c in zip(*(s["input"] for s in sites.values()), strict=True)]
    found = {"sid": changed["sid"].hex(), "u3": changed["u3"].hex(), "sum": total}
    assert found[field] != SESSION[field]


@pytest.mark.parametrize("position", [0, 5, 40, 80, 110, 160])
def test_bad_hello(position):
    """A vector's hello with one bit flipped must fail, wherever the bit is."""
    _rows, roster, parameters, sessions = vector_sites()
    tally = Tally(parameters=parameters, roster=roster)
    reply = bytearray(sessions[7].hello(tally.request()))
    reply[position] ^= 1
    with pytest.raises(ProtocolError):
        tally.add_hello(7, bytes(reply))


STAGES = ("R0", "R1", "R2", "R3", "R4")


def deliver(session: SiteSession, stage: str, message: bytes) -> None:
    if stage == "R2":
        words = np.array(SESSION["sites"][str(REFUSED["site"])]["input"], dtype=np.uint32)
        session.masked(message, words)
    else:
        names = {"R0": "hello", "R1": "shares", "R3": "consistency", "R4": "unmask"}
        getattr(session, names[stage])(message)


def led_to(stage: str) -> SiteSession:
    """The vector's site after the good messages before a stage."""
    session = vector_sites()[3][REFUSED["site"]]
    for before in STAGES[: STAGES.index(stage)]:
        deliver(session, before, bytes.fromhex(REFUSED["good"][before]))
    return session


@pytest.mark.parametrize("stage", STAGES)
def test_the_good_messages_of_the_refused_vectors_are_good(stage):
    deliver(led_to(stage), stage, bytes.fromhex(REFUSED["good"][stage]))


@pytest.mark.parametrize(
    "case", REFUSED["bad"], ids=[f"{c['stage']} {c['why']}" for c in REFUSED["bad"]]
)
def test_vectors_that_a_site_must_refuse(case):
    session = led_to(case["stage"])
    with pytest.raises(ProtocolError):
        deliver(session, case["stage"], bytes.fromhex(case["message"]))
    assert session.dead


def changed_r2(envelope: str) -> bytes:
    """The good R2 message to the vector's site, with another envelope of its first dealer."""
    good = bytes.fromhex(REFUSED["good"]["R2"])
    return good[:20] + bytes.fromhex(COMPLAINTS["envelopes"][envelope]) + good[266:]


def test_the_honest_envelope_of_the_complaints_is_the_session_s():
    assert changed_r2("honest") == bytes.fromhex(REFUSED["good"]["R2"])


@pytest.mark.parametrize("envelope", COMPLAINTS["said"])
def test_what_a_site_complains_byte_for_byte(envelope):
    session = led_to("R2")
    with pytest.raises(Complaint) as caught:
        deliver(session, "R2", changed_r2(envelope))
    expected = COMPLAINTS["complaints"][COMPLAINTS["said"][envelope]]
    assert caught.value.message.hex() == expected
    assert session.dead


def vector_cohort() -> tuple[Cohort, PinnedKeys]:
    _rows, roster, parameters, _sessions = vector_sites()
    pinned, hellos = PinnedKeys(roster), bytes.fromhex(REFUSED["good"]["R1"])
    return form_cohort(parameters, pinned, wire.decode_hellos(hellos)), pinned


def judged(complaint: str, envelope: str) -> frozenset[int]:
    sent = wire.decode_envelopes(changed_r2(envelope))[1][0]
    return judge(*vector_cohort(), wire.decode_complaint(bytes.fromhex(complaint)), sent)


@pytest.mark.parametrize(
    "case",
    COMPLAINTS["verdicts"],
    ids=[f"{c['envelope']}, {c['complaint']}" for c in COMPLAINTS["verdicts"]],
)
def test_whom_a_complaint_makes_suspect(case):
    complaint = COMPLAINTS["complaints"][case["complaint"]]
    assert judged(complaint, case["envelope"]) == set(case["suspects"])


@pytest.mark.parametrize("why", COMPLAINTS["no_complaint"])
def test_complaints_that_nobody_signed_for_this_session(why):
    with pytest.raises(SiteFault) as caught:
        judged(COMPLAINTS["no_complaint"][why], "it does not open")
    assert caught.value.site == COMPLAINTS["holder"]
