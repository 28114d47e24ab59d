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


def main() -> None:
    for name, value in (("primitives", primitives_vector()), ("session", session_vector())):
        text = json.dumps(value, indent=1) + "\n"
        (HERE / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
