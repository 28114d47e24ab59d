"""The signed letters between coordinator and sites, carried as the content of Flower messages.

Flower's node authentication signs no content, so every letter carries its sender's own Ed25519
signature over action, attempt, site, code and the SHA-256 of each part.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import ConfigurationError, IdentityError, InvalidValue, SiteCode
from fedward.identity import Identity, verify

SESSION_ACTIONS = ("hello", "shares", "masked", "consistency", "unmask")
"""The exchanges of one session of secure aggregation, in order."""

MESSAGE_TYPES = {
    "task": "train",
    **{action: f"train.{action}" for action in SESSION_ACTIONS},
    "evaluate": "evaluate",
}
"""Everything a coordinator can ask of a site, with the Flower message type that carries it."""

Sender = Literal["coordinator", "site"]

_HEADER_LIMIT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One message of a round, in either direction.

    Args:
        action: One of :data:`MESSAGE_TYPES`.
        attempt: The run, round, session and attempt it belongs to.
        site: The roster id of the site it goes to or comes from.
        code: A site's answer; None in the coordinator's letters.
        parts: Named payloads.
    """

    action: str
    attempt: Attempt
    site: int
    code: SiteCode | None = None
    parts: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what a signed header may hold."""
        if type(self.action) is not str or self.action not in MESSAGE_TYPES:
            raise InvalidValue("action", self.action, f"one of {', '.join(MESSAGE_TYPES)}")
        if type(self.site) is not int:
            raise InvalidValue("site", self.site, "a whole number")

    def part(self, name: str) -> bytes:
        """A part by name.

        Raises:
            IdentityError: The sender left it out.
        """
        if name not in self.parts:
            raise IdentityError(f"a {self.action!r} letter needs the part {name!r}")
        return self.parts[name]

    def header(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(
            {
                "action": self.action,
                "run": self.attempt.run,
                "order": self.attempt.order,
                "site": self.site,
                "code": self.code,
                "parts": {k: hashlib.sha256(v).hexdigest() for k, v in self.parts.items()},
            }
        )


def seal_letter(letter: Letter, identity: Identity, sender: Sender) -> RecordDict:
    """Sign a letter and put it into the records of a Flower message."""
    header = letter.header()
    signature = identity.sign(f"fedward/1/{sender}", header)
    arrays = {name: _to_array(data) for name, data in letter.parts.items()}
    records = RecordDict({"letter": ConfigRecord({"header": header, "signature": signature})})
    records["parts"] = ArrayRecord(arrays)
    return records


def open_letter(records: RecordDict, public_key: bytes, sender: Sender) -> Letter:
    """Check the signature and every part of a letter, then read it.

    Raises:
        IdentityError: The signature does not hold, a part is missing, extra or altered, or the
            header is malformed.
    """
    header, signature = _signed_bytes(records)
    verify(public_key, f"fedward/1/{sender}", signature, header)
    arrays = records.array_records.get("parts", ArrayRecord())
    parts = {name: _from_array(array) for name, array in arrays.items()}
    try:
        fields = json.loads(header)
        round_number, session, attempt = fields["order"]
        letter = Letter(
            action=fields["action"],
            attempt=Attempt(
                run=fields["run"], round=round_number, session=session, attempt=attempt
            ),
            site=fields["site"],
            code=None if fields["code"] is None else SiteCode(fields["code"]),
            parts=parts,
        )
        same = letter.header() == header
    except (ValueError, KeyError, TypeError, RecursionError, ConfigurationError) as error:
        raise IdentityError("a signed letter is malformed") from error
    if not same:
        raise IdentityError("a letter's parts are not the ones its sender signed")
    return letter


def _signed_bytes(records: RecordDict) -> tuple[bytes, bytes]:
    """Header and signature of a letter, still unchecked."""
    config = records.config_records.get("letter", ConfigRecord())
    header, signature = config.get("header"), config.get("signature")
    if not isinstance(header, bytes) or not isinstance(signature, bytes):
        raise IdentityError("a message without a signed letter")
    if len(header) > _HEADER_LIMIT:
        raise IdentityError(f"a letter's header has {len(header)} bytes, at most {_HEADER_LIMIT}")
    return header, signature


def _to_array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)


def _from_array(array: Array) -> bytes:
    if array.stype != "raw" or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise IdentityError("a letter's part is not a plain byte string")
    return bytes(array.data)
