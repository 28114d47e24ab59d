"""Over the whole test run: no mask stream is ever put on two inputs."""

import hashlib

import pytest

from fedward.aggregation import site_session

USED = {}
"""(key, sign) of every mask that any site applied, to the input it was applied to."""


def record(words, keys, sign):
    fingerprint = hashlib.sha256(words.tobytes()).digest()
    for key in keys:
        before = USED.setdefault((key, sign), fingerprint)
        assert before == fingerprint, "a mask stream covers two inputs"


@pytest.fixture(autouse=True)
def no_mask_is_reused(monkeypatch):
    """Two inputs under one mask give their difference away."""
    apply_masks = site_session.apply_masks

    def watched(vector, *, add, subtract, **options):
        record(vector, add, "+")
        record(vector, subtract, "-")
        apply_masks(vector, add=add, subtract=subtract, **options)

    monkeypatch.setattr(site_session, "apply_masks", watched)
