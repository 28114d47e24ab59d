"""Writes ``vectors/*.json`` from the reference: ``python -m tests.aggregation.make_vectors``."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.aggregation import reference as ref

HERE = Path(__file__).parent / "vectors"
PARAMETERS = (
    '{"attempt":1,"bits":30,"clip":"0x1.0000000000000p+0","colluders":0,"deadline":3600,'
    '"dropouts":0,"gamma":"0x1.0000000800000p-29","minimum":3,"noise":"0x0.0p+0",'
    '"proto":"secagg/1","roster_hash":"%s","rotated":0,"round":1,"run":"vectors","session":1,"sites":3,'
    '"slots":[],"task_hash":"%s","weights":"uniform","word_bits":32,"words":5}'
)


def secret(label: str, size: int = 32) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


def roster_hash(sites: dict[int, dict[str, Any]]) -> bytes:
    coordinator = Ed25519PrivateKey.from_private_bytes(secret("coordinator"))
    rows = [
        ref.h(
            ref.i(n),
            f"site {n}".encode(),
            Ed25519PrivateKey.from_private_bytes(s["identity"]).public_key().public_bytes_raw(),
        )
        for n, s in sorted(sites.items())
    ]
    key = coordinator.public_key().public_bytes_raw()
    return ref.h("roster", (1).to_bytes(8, "big"), key, *rows)


def three_sites() -> dict[int, dict[str, Any]]:
    """Secrets of each site in the order a session draws them, and inputs at the extremes."""
    sites: dict[int, dict[str, Any]] = {}
    for n in (2, 7, 300):
        draws = [secret(f"{n} envelope"), secret(f"{n} mask"), secret(f"{n} nonce")]
        seed = secret(f"{n} seed")
        coefficients = [secret(f"{n} coefficient {c}", 48) for c in range(2)]
        sites[n] = {
            "identity": secret(f"{n} identity"),
            "envelope": draws[0],
            "mask": draws[1],
            "nonce": draws[2],
            "seed": seed,
            "seed_coefficients": [int.from_bytes(coefficients[0], "big") % ref.PRIME],
            "mask_coefficients": [int.from_bytes(coefficients[1], "big") % ref.PRIME],
            "draws": [*draws, seed, *coefficients],
            "input": [n, 0, 1, 2**31 - 1, 2**32 - 1],
        }
    return sites


def session_vector() -> dict[str, Any]:
    sites = three_sites()
    parameters = (PARAMETERS % (roster_hash(sites).hex(), ref.h("task").hex())).encode()
    out = ref.transcript(parameters, sites, 4)
    return {
        "note": "three sites, complete graph, T = 0, t = 2, nobody vanishes",
        "parameters": parameters.decode(),
        "sites": {
            n: {
                "identity": s["identity"].hex(),
                "draws": [draw.hex() for draw in s["draws"]],
                "input": s["input"],
                "hello": out["hello"][n].hex(),
                "shares": out["shares"][n].hex(),
                "masked": out["masked"][n][0].hex(),
                "header": out["masked"][n][1].hex(),
                "vote": out["vote"][n].hex(),
            }
            for n, s in sites.items()
        },
        "sid": out["sid"].hex(),
        "u2": out["u2"].hex(),
        "u3": out["u3"].hex(),
        "sum": [sum(column) % 2**32 for column in zip(*(s["input"] for s in sites.values()))],  # noqa: B905  # all of one length
    }


def primitives_vector() -> dict[str, Any]:
    sid = ref.h("sid", bytes(32))
    key = bytes(range(32))
    a, b = secret("a"), secret("b")
    coefficients = [secret(f"c{n}", 48) for n in range(2)]
    numbers = [int.from_bytes(c, "big") % ref.PRIME for c in coefficients]
    return {
        "h": [
            {"fields": [f.hex() for f in fields], "digest": ref.h(*fields).hex()}
            for fields in ([], [b""], [b"", b""], [b"abc", b""], [b"ab", b"c"], [bytes(300)])
        ],
        "kdf": [
            {
                "secret": s.hex(),
                "salt": sid.hex(),
                "fields": [f.hex() for f in fields],
                "key": ref.kdf(s, sid, *fields).hex(),
            }
            for s, fields in ((bytes(32), [b"self", ref.i(7)]), (a, [b"pair", ref.i(1), ref.i(2)]))
        ],
        "stream": [
            {"key": key.hex(), "word_bytes": size, "words": ref.stream(key, 9, size)}
            for size in (2, 4)
        ],
        "stream_across_blocks": {
            "key": key.hex(),
            "first_16_bytes_of_block": {
                "0": "0ebcb5deb52c83bd08a8a935182c9199",
                "1": "15d6bffc44f4301e0e2e5139eca63af7",
            },
            "sha256_of_block_0": (
                "0f29e8291178c2f5a30e9ad6dd983925634125a04f85716e954803612953b318"
            ),
        },
        "envelope": {
            "private": a.hex(),
            "public": ref.public(b).hex(),
            "session": sid.hex(),
            "dealer": 3,
            "holder": 9,
            "plain": bytes(66).hex(),
            "sealed": ref.envelope(a, ref.public(b), sid, 3, 9, bytes(66)).hex(),
        },
        "shamir": [
            {
                "secret": s.hex(),
                "draws": [c.hex() for c in coefficients],
                "threshold": 3,
                "shares": [x.hex() for x in ref.share(s, numbers, 5)],
            }
            for s in (bytes(32), bytes([255]) * 32, bytes(31) + b"\x01", a)
        ],
    }


def messages_to(site: int, out: dict[str, Any]) -> dict[str, bytes]:
    """What the coordinator sends a site of the session vector, exchange by exchange."""
    ids = sorted(out["hello"])
    envelopes = b""
    for dealer in ids:
        head, rows = out["shares"][dealer][:100], out["shares"][dealer][100:]
        for row in (rows[o : o + 214] for o in range(0, len(rows), 214)):
            if row[:4] == ref.i(site):
                envelopes += ref.i(dealer) + head[4:36] + row[4:]
    return {
        "R1": b"SA1H" + b"".join(out["hello"][n] for n in ids),
        "R2": b"SA1E" + len(ids).to_bytes(4, "big") + b"".join(map(ref.i, ids)) + envelopes,
        "R3": b"SA1Y" + b"".join(out["masked"][n][1] for n in ids),
        "R4": b"SA1V" + b"".join(out["vote"][n] for n in ids),
    }


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def refused_vector() -> dict[str, Any]:
    """Well-formed messages that site 2 of the session vector must refuse."""
    sites = three_sites()
    vector = session_vector()
    out = ref.transcript(vector["parameters"].encode(), sites, 4)
    good = messages_to(2, out)
    r1, r2, r3, r4 = (good[stage] for stage in ("R1", "R2", "R3", "R4"))
    forged = ref.sig(secret("stranger"), "R3", out["sid"], out["u3"])
    other = ref.sig(sites[7]["identity"], "R3", out["sid"], bytes(32))
    cases = [
        ("R0", "another minimum", vector["parameters"].replace('sites":3', 'sites":4').encode()),
        ("R0", "another run", vector["parameters"].replace("vectors", "vectora").encode()),
        ("R1", "a site is missing: below the minimum", r1[: 4 + 2 * 164]),
        ("R1", "its own hello is missing", r1[:4] + r1[4 + 164 :]),
        *[
            ("R1", f"byte {o} of a hello is another", flipped(r1, 4 + 164 + o))
            for o in (3, 10, 40, 80, 120)
        ],
        ("R1", "site 7's hello under the id 8", r1[: 4 + 164] + ref.i(8) + r1[4 + 168 :]),
        ("R2", "its own id is missing", r2[:4] + ref.i(2) + r2[12:]),
        ("R2", "an id that was not in U1", r2[:16] + ref.i(301) + r2[20:]),
        ("R2", "an envelope is missing", r2[: 20 + 246]),
        (
            "R2",
            "both envelopes are of one dealer's text",
            r2[: 20 + 246] + ref.i(300) + r2[24 : 20 + 246],
        ),
        *[
            ("R2", f"byte {o} of an envelope is another", flipped(r2, 20 + o))
            for o in (10, 40, 130, 150, 200)
        ],
        ("R3", "its own header is missing", r3[:4] + r3[104:]),
        ("R3", "a survivor too few", r3[:204]),
        *[("R3", f"byte {o} of a header is another", flipped(r3, 104 + o)) for o in (3, 10, 50)],
        ("R4", "below the quorum of 2", r4[: 4 + 68]),
        ("R4", "a stranger's signature", r4[:4] + ref.i(2) + forged + r4[72:]),
        ("R4", "a vote for another survivor set", r4[:72] + ref.i(7) + other),
        ("R4", "a signer outside U3", r4[: 4 + 2 * 68] + ref.i(301) + r4[-64:]),
    ]
    return {
        "note": "site 2 of session.json gets the good messages up to a stage, then the bad one",
        "site": 2,
        "good": {
            "R0": vector["parameters"].encode().hex(),
            **{k: v.hex() for k, v in good.items()},
        },
        "bad": [{"stage": s, "why": why, "message": m.hex()} for s, why, m in cases],
    }


def complaints_vector() -> dict[str, Any]:
    """What site 2 says of site 7's envelopes, and who is suspected for it."""
    sites = three_sites()
    out = ref.transcript(session_vector()["parameters"].encode(), sites, 4)
    holder, dealer, sid = 2, 7, out["sid"]
    row = messages_to(holder, out)["R2"][20:266]  # the first of the two, site 7's
    cb, e, hb, hs = row[4:36], row[36:118], row[118:150], row[150:182]

    def signed(e: bytes, hb: bytes = hb, hs: bytes = hs) -> bytes:
        bound = (sid, ref.i(dealer), ref.i(holder), ref.i(1), e, hb, hs, cb)
        return ref.i(dealer) + cb + e + hb + hs + ref.sig(sites[dealer]["identity"], "R1", *bound)

    other = ref.public(sites[dealer]["envelope"])
    key = ref.envelope_key(sites[holder]["envelope"], other, sid, dealer, holder)
    other_shares = ref.envelope(
        sites[dealer]["envelope"], ref.public(sites[holder]["envelope"]), sid, dealer, holder,
        bytes(66),
    )  # fmt: skip
    rows = {
        "honest": row,
        "it does not open": signed(bytes(82)),
        "its shares do not match hb and hs": signed(other_shares),
        "hs is another": signed(e, hs=bytes(32)),
        "its signature is not the dealer's": row[:36] + bytes(82) + row[118:],
    }
    keys = {"the envelope's key": key, "no key": bytes(32), "a made-up key": secret("made up")}
    said = {
        "it does not open": "the envelope's key",
        "its shares do not match hb and hs": "the envelope's key",
        "hs is another": "the envelope's key",
        "its signature is not the dealer's": "no key",
    }
    verdicts = [
        ("it does not open", "the envelope's key", [2, 7]),
        ("its shares do not match hb and hs", "the envelope's key", [7]),
        ("hs is another", "the envelope's key", [7]),
        ("its signature is not the dealer's", "no key", [7]),
        ("its signature is not the dealer's", "the envelope's key", [7]),
        ("it does not open", "no key", [2]),
        ("honest", "no key", [2]),
        ("honest", "the envelope's key", [2]),
        ("honest", "a made-up key", [2, 7]),
    ]
    by = sites[holder]["identity"]
    complaints = {name: ref.complaint(by, sid, holder, dealer, k) for name, k in keys.items()}
    stranger = ref.complaint(secret("stranger"), sid, holder, dealer, key)
    return {
        "note": "site 2 of session.json, and envelopes of site 7 for it as they stand in R2",
        "holder": holder,
        "envelopes": {name: data.hex() for name, data in rows.items()},
        "complaints": {name: data.hex() for name, data in complaints.items()},
        "said": said,
        "verdicts": [
            {"envelope": e, "complaint": c, "suspects": suspects} for e, c, suspects in verdicts
        ],
        "no_complaint": {
            "a stranger's signature": stranger.hex(),
            "of another session": ref.complaint(by, bytes(32), holder, dealer, key).hex(),
        },
    }


def malformed_vector() -> list[dict[str, str]]:
    """Messages that no decoder may take."""
    sites = three_sites()
    parameters = (PARAMETERS % (roster_hash(sites).hex(), ref.h("task").hex())).encode()
    out = ref.transcript(parameters, sites, 4)
    good = messages_to(2, out)
    hello, shares = b"SA1h" + out["hello"][2], b"SA1s" + out["shares"][2]
    header, vote = b"SA1y" + out["masked"][2][1], b"SA1v" + out["vote"][2]
    complaint = ref.complaint(sites[2]["identity"], out["sid"], 2, 7, bytes(32))
    released = b"SA1r" + ref.i(2) + b"".join(ref.i(n) + bytes(33) for n in (2, 7))
    cases = []
    for kind, message, head, size in (
        ("hello", hello, 4, 164),
        ("hellos", good["R1"], 4, 164),
        ("shares", shares, 104, 214),
        ("envelopes", good["R2"], 20, 246),
        ("header", header, 4, 100),
        ("survivors", good["R3"], 4, 100),
        ("vote", vote, 4, 68),
        ("certificate", good["R4"], 4, 68),
        ("complaint", complaint, 4, 104),
        ("released", released, 8, 37),
    ):
        one, two = message[head : head + size], message[head + size : head + 2 * size]
        cases += [
            (kind, "empty", b""),
            (kind, "another kind", b"SA1x" + message[4:]),
            (kind, "another version", b"SA2" + message[3:]),
            (kind, "a byte short", message[:-1]),
            (kind, "a byte long", message + b"\0"),
        ]
        if two:
            cases += [
                (kind, "a record twice", message[:head] + one + one),
                (kind, "records in the wrong order", message[:head] + two + one),
            ]
    cases += [
        ("envelopes", "more ids promised than come", b"SA1E" + b"\xff" * 4 + good["R2"][8:]),
        ("envelopes", "ids in the wrong order", good["R2"][:8] + good["R2"][8:16][::-1]),
    ]
    for why, old, new in (
        ("a space", b'"attempt":1', b'"attempt": 1'),
        ("a real number", b'"attempt":1', b'"attempt":1.0'),
        ("true for 1", b'"attempt":1', b'"attempt":true'),
        ("attempt 0", b'"attempt":1', b'"attempt":0'),
        ("a key is missing", b'"attempt":1,', b""),
        ("an unknown key", b'"attempt":1', b'"attempt":1,"attempu":1'),
        ("a key twice", b'"attempt":1', b'"attempt":1,"attempt":1'),
        ("another protocol", b"secagg/1", b"secagg/2"),
        ("a decimal real", b'"0x0.0p+0"', b'"0.0"'),
        ("noise without end", b'"0x0.0p+0"', b'"inf"'),
        ("noise beyond a double", b'"0x0.0p+0"', b'"0x1p5000"'),
        ("a grid step that does not follow", b"0x1.0000000800000p-29", b"0x1.0p-29"),
        ("24-bit words", b'"word_bits":32', b'"word_bits":24'),
        ("a minimum of 2", b'"minimum":3', b'"minimum":2'),
        ("a minimum of T + 1", b'"colluders":0', b'"colluders":2'),
        ("a minimum above the sites", b'"minimum":3', b'"minimum":4'),
        ("hidden weights", b"uniform", b"secret!"),
        ("a short hash", b'"roster_hash":"', b'"roster_hash":"00'),
        ("half a surrogate pair", b'"run":"vectors"', b'"run":"\\ud800"'),
    ):
        changed = parameters.replace(old, new)
        assert changed != parameters
        cases.append(("parameters", why, changed))
    return [{"kind": kind, "why": why, "message": data.hex()} for kind, why, data in cases]


def all_vectors() -> dict[str, Any]:
    """Every file's content by name."""
    return {
        "primitives": primitives_vector(),
        "session": session_vector(),
        "refused": refused_vector(),
        "complaints": complaints_vector(),
        "malformed": malformed_vector(),
    }


def main() -> None:
    for name, value in all_vectors().items():
        text = json.dumps(value, indent=1) + "\n"
        (HERE / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
