"""Over the whole test run: no mask stream is ever put on two inputs."""

import hashlib
from collections.abc import Sequence

import pytest

from fedward.aggregation import site_session
from fedward.aggregation.masks import Words, apply_masks

USED: dict[tuple[bytes, str], bytes] = {}
"""(key, sign) of every mask that any site applied, to the input it was applied to."""


def record(words: Words, keys: Sequence[bytes], sign: str) -> None:
    fingerprint = hashlib.sha256(words.tobytes()).digest()
    for key in keys:
        before = USED.setdefault((key, sign), fingerprint)
        assert before == fingerprint, "a mask stream covers two inputs"


@pytest.fixture(autouse=True)
def no_mask_is_reused(monkeypatch):
    """Two inputs under one mask give their difference away."""

    def watched(
        vector: Words, *, add: Sequence[bytes], subtract: Sequence[bytes], threads: int
    ) -> None:
        record(vector, add, "+")
        record(vector, subtract, "-")
        apply_masks(vector, add=add, subtract=subtract, threads=threads)

    monkeypatch.setattr(site_session, "apply_masks", watched)
