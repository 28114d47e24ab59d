"""One byte string for one value: canonical JSON and the length-prefixed digest of ``secagg/1``."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def canonical_json(value: Json) -> bytes:
    """Encode a value so that equal values give equal bytes (sorted keys, no spaces, UTF-8).

    Floats are written by ``repr``, which round-trips float64, so that 8 and 8.0 differ; infinities
    as ``Infinity``. A caller refuses NaN, which equals nothing, before it comes here.

    >>> canonical_json({"b": 1, "a": [0.5, None]})
    b'{"a":[0.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(*fields: bytes | str) -> bytes:
    """SHA-256 over every field behind its 8-byte big-endian length (``H`` in the protocol spec).

    Text fields are ASCII tags. The length prefix makes the encoding injective: no two different
    lists of fields share an input.

    >>> digest("abc", "").hex()
    'f5a934b5ab96157b46905e4dec48ff8175fe8926c36ec293b98c8fbd0886171b'
    """
    hasher = hashlib.sha256()
    for field in fields:
        data = field.encode("ascii") if isinstance(field, str) else field
        hasher.update(len(data).to_bytes(8, "big"))
        hasher.update(data)
    return hasher.digest()
