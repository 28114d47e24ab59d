"""Nothing in the tests may reach a hub, and no mask stream is ever put on two inputs."""

import os
import shutil
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 2**30:  # noqa: PTH112, S108
    tempfile.tempdir = os.environ.setdefault("TMPDIR", "/dev/shm")  # noqa: S108  # fsync is free there

import fedward  # noqa: F401  # switches telemetry off before any test imports a library

# isort: split

import gc
import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import settings

from fedward.aggregation import masks, site_session
from fedward.aggregation.masks import Words

# On a busy machine an example may take a second that takes a millisecond elsewhere.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: each training calls ``gc.collect``, which went through all of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


USED: dict[tuple[bytes, str], bytes] = {}
"""(key, sign) of every mask that any site of any test applied, to the input it was applied to."""


def record(words: Words, keys: Sequence[bytes], sign: str) -> None:
    """Two inputs under one mask give their difference away."""
    fingerprint = hashlib.sha256(words.tobytes()).digest()
    for key in keys:
        before = USED.setdefault((key, sign), fingerprint)
        assert before == fingerprint, "a mask stream covers two inputs"


@pytest.fixture(autouse=True)
def no_mask_is_reused(monkeypatch):
    """Watch every site of this process, in all folders."""

    def watched(
        vector: Words, *, add: Sequence[bytes], subtract: Sequence[bytes], threads: int
    ) -> None:
        record(vector, add, "+")
        record(vector, subtract, "-")
        masks.apply_masks(vector, add=add, subtract=subtract, threads=threads)

    monkeypatch.setattr(site_session, "apply_masks", watched)
