"""The specification once more, naively and from other primitives: what the vectors come from.

HKDF and HMAC from the standard library, the mask stream from AES in ECB mode with a counter of its
own, Shamir with fractions modulo the prime. Nothing is imported from fedward.
"""

import hashlib
import hmac
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB

PRIME = 2**256 + 297


def h(*fields: bytes | str) -> bytes:
    data = b""
    for field in fields:
        raw = field.encode() if isinstance(field, str) else field
        data += len(raw).to_bytes(8, "big") + raw
    return hashlib.sha256(data).digest()


def i(site: int) -> bytes:
    return site.to_bytes(4, "big")


def kdf(secret: bytes, salt: bytes, *fields: bytes | str) -> bytes:
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, h(*fields) + b"\x01", "sha256")


def sig(seed: bytes, tag: str, *fields: bytes) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.sign(b"secagg/1/" + tag.encode() + h(*fields))


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def dh(private: bytes, other: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(other)
    )


def stream(key: bytes, words: int, word_bytes: int) -> list[int]:
    """The first words of a mask as integers."""
    per_block = (1 << 22) * word_bytes // 16
    out = bytearray()
    number = 0
    encrypt = Cipher(AES256(key), ECB()).encryptor()  # noqa: S305  # the counter is made by hand
    while len(out) < words * word_bytes:
        block, place = divmod(number, per_block)
        out += encrypt.update(block.to_bytes(12, "big") + (2 + place).to_bytes(4, "big"))
        number += 1
    return [
        int.from_bytes(out[o : o + word_bytes], "little")
        for o in range(0, words * word_bytes, word_bytes)
    ]


def share(secret: bytes, coefficients: list[int], holders: int) -> list[bytes]:
    """Shares of a secret; coefficients from the highest power down to x^1."""
    polynomial = [*coefficients, int.from_bytes(secret, "big")]
    degree = len(polynomial) - 1
    return [
        (sum(c * pow(x, degree - n, PRIME) for n, c in enumerate(polynomial)) % PRIME).to_bytes(
            33, "big"
        )
        for x in range(1, holders + 1)
    ]


def envelope_key(private: bytes, other: bytes, sid: bytes, dealer: int, holder: int) -> bytes:
    return kdf(dh(private, other), sid, "env", i(dealer), i(holder))


def envelope(
    private: bytes, other: bytes, sid: bytes, dealer: int, holder: int, plain: bytes
) -> bytes:
    key = envelope_key(private, other, sid, dealer, holder)
    return AESGCM(key).encrypt(bytes(12), plain, h(sid, i(dealer), i(holder)))


def complaint(seed: bytes, sid: bytes, holder: int, dealer: int, key: bytes) -> bytes:
    signature = sig(seed, "C", sid, i(holder), i(dealer), key)
    return b"SA1c" + i(holder) + i(dealer) + key + signature


def transcript(parameters: bytes, sites: dict[int, dict[str, Any]], word_bytes: int) -> Any:
    """Every value of a session without dropouts on the complete graph.

    ``sites`` maps id to identity, envelope, mask, nonce, seed (32 bytes each), the coefficients of
    both sharings, and the input words.
    """
    ids = sorted(sites)
    out: dict[str, Any] = {"hello": {}, "shares": {}, "masked": {}, "vote": {}}
    for n in ids:
        s = sites[n]
        fields = (i(n), public(s["envelope"]), public(s["mask"]), s["nonce"])
        out["hello"][n] = b"".join(fields) + sig(s["identity"], "R0", h(parameters), *fields)
    sid = out["sid"] = h("sid", h(parameters), *(out["hello"][n] for n in ids))
    for n in ids:
        s = sites[n]
        b = share(s["seed"], s["seed_coefficients"], len(ids))
        k = share(s["mask"], s["mask_coefficients"], len(ids))
        cb = h("bcommit", sid, s["seed"])
        rows, head = {}, b""
        for x, m in enumerate(ids, 1):
            hb = h("hb", sid, i(n), i(m), b[x - 1])
            hs = h("hs", sid, i(n), i(m), k[x - 1])
            if m == n:
                head = i(n) + cb + hb + hs
                continue
            other = public(sites[m]["envelope"])
            e = envelope(s["envelope"], other, sid, n, m, b[x - 1] + k[x - 1])
            signature = sig(s["identity"], "R1", sid, i(n), i(m), i(x), e, hb, hs, cb)
            rows[m] = i(m) + e + hb + hs + signature
        out["shares"][n] = head + b"".join(rows[m] for m in sorted(rows))
    u2 = out["u2"] = h("U2", sid, *map(i, ids))
    for n in ids:
        s = sites[n]
        y = masked_input(sites, n, sid, u2, word_bytes)
        raw = b"".join(word.to_bytes(word_bytes, "little") for word in y)
        hy = hashlib.sha256(raw).digest()
        signature = sig(s["identity"], "R2", sid, u2, i(n), hy)
        out["masked"][n] = (raw, i(n) + hy + signature)
    u3 = out["u3"] = h("U3", sid, u2, *(out["masked"][n][1][:36] for n in ids))
    for n in ids:
        out["vote"][n] = i(n) + sig(sites[n]["identity"], "R3", sid, u3)
    return out


def masked_input(
    sites: dict[int, dict[str, Any]], n: int, sid: bytes, u2: bytes, word_bytes: int
) -> list[int]:
    s, modulus = sites[n], 1 << (8 * word_bytes)
    y = list(s["input"])
    mask = stream(kdf(s["seed"], sid, "self", i(n)), len(y), word_bytes)
    y = [(a + b) % modulus for a, b in zip(y, mask, strict=True)]
    for m in sites:
        if m != n:
            shared = dh(s["mask"], public(sites[m]["mask"]))
            key = kdf(shared, sid, "pair", i(min(n, m)), i(max(n, m)), u2)
            sign = 1 if n < m else -1
            mask = stream(key, len(y), word_bytes)
            y = [(a + sign * b) % modulus for a, b in zip(y, mask, strict=True)]
    return y
