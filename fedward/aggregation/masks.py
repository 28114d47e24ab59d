"""Mask streams: AES-256 keystreams added to a vector in pieces that stay in the cache (§4, PRG).

Block ``B`` of a stream holds words ``B·2^22 .. (B+1)·2^22 - 1``: the AES-256-GCM encryption of zero
bytes under the nonce ``B``, whose tag nobody computes. The same bytes come from AES-256-CTR with
the first counter ``nonce ‖ 00000002``; which of the two is faster depends on the processor.
"""

import functools
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM

from fedward.errors import ProtocolError

Words: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Mode: TypeAlias = Literal["gcm", "ctr"]

BLOCK_WORDS = 1 << 22
"""Words under one nonce."""

_CHUNK_BYTES = 1 << 18  # a piece of the vector and a piece of keystream stay in the L2 cache
_ZEROS = bytes(_CHUNK_BYTES)


def keystream(key: bytes, block: int, mode: Mode) -> CipherContext:
    """Encrypts zeros to the words of one block of a mask.

    Args:
        key: 32 bytes that serve one mask and nothing else.
        block: Number of the block, from 0.
        mode: ``gcm`` or ``ctr``: the same bytes at different speed.
    """
    nonce = block.to_bytes(12, "big")
    if mode == "gcm":
        return Cipher(AES256(key), GCM(nonce)).encryptor()
    return Cipher(AES256(key), CTR(nonce + (2).to_bytes(4, "big"))).encryptor()


@functools.cache
def fastest_mode() -> Mode:
    """Time both modes once on this processor (a millisecond) and keep the faster one."""
    return min(("gcm", "ctr"), key=_seconds)


def _seconds(mode: Mode) -> float:
    buffer = bytearray(_CHUNK_BYTES + 15)
    stream = keystream(bytes(32), 0, mode)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        stream.update_into(_ZEROS, buffer)
        times.append(time.perf_counter() - start)
    return min(times)


def apply_masks(
    vector: Words,
    *,
    add: Sequence[bytes] = (),
    subtract: Sequence[bytes] = (),
    threads: int = 1,
    mode: Mode | None = None,
) -> None:
    """Add and subtract whole mask streams, in place, modulo 2^w.

    Args:
        vector: ``(d,)``, uint32 or uint16, contiguous, little-endian.
        add: Keys of the streams to add, 32 bytes each.
        subtract: Keys of the streams to subtract.
        threads: Blocks worked on at the same time (the interpreter's lock is released).
        mode: Left out, the faster one here.

    Raises:
        ProtocolError: Another shape or type of vector, or a key twice: two uses of one stream
            would cancel, or stand in the sum twice.

    Guarantees:
        Memory stays at the vector plus a quarter of a MiB a thread.
    """
    keys = [*((key, False) for key in add), *((key, True) for key in subtract)]
    if len({key for key, _ in keys}) != len(keys):
        raise ProtocolError("a mask key is used twice")
    check_vector(vector)
    if not vector.flags.writeable:
        raise ProtocolError("the vector is read-only: it was masked before, or must not change")
    chosen = mode or fastest_mode()
    blocks = range(0, len(vector), BLOCK_WORDS)

    def work(start: int) -> None:
        _mask_block(vector[start : start + BLOCK_WORDS], start // BLOCK_WORDS, keys, chosen)

    if threads == 1 or len(blocks) == 1:
        for start in blocks:
            work(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, blocks))


def check_vector(vector: Words) -> None:
    """Check type and layout of a vector of words.

    Raises:
        ProtocolError: Not one-dimensional, contiguous, little-endian uint32 or uint16.
    """
    little = vector.dtype in (np.dtype("<u4"), np.dtype("<u2"))
    if vector.ndim != 1 or not little or not vector.flags.c_contiguous:
        raise ProtocolError(
            f"a vector of words is contiguous uint32 or uint16 of one dimension, not "
            f"{vector.dtype} of {vector.ndim}"
        )


def _mask_block(piece: Words, block: int, keys: Sequence[tuple[bytes, bool]], mode: Mode) -> None:
    """Every stream's share of one block: pieces of the vector outside, streams inside."""
    step = _CHUNK_BYTES // piece.itemsize
    buffer = bytearray(_CHUNK_BYTES + 15)  # update_into wants room for a partial AES block
    stream_words = np.frombuffer(buffer, dtype=piece.dtype, count=step)
    streams = [(keystream(key, block, mode), negative) for key, negative in keys]
    for start in itertools.count(0, step):
        chunk = piece[start : start + step]
        if not len(chunk):
            return
        zeros = memoryview(_ZEROS)[: chunk.nbytes]
        for stream, negative in streams:
            stream.update_into(zeros, buffer)
            operation = np.subtract if negative else np.add
            operation(chunk, stream_words[: len(chunk)], out=chunk)
