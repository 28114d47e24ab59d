"""Mask one input and print the process's peak memory in MB (Linux): a child of the benchmark.

    python -m masking.mask_once ours|ours16|theirs DIMENSION NEIGHBOURS   # in benchmarks/

Each way imports what a site needs for it, and neither torch nor the other way.
"""

import sys
from pathlib import Path

import numpy as np


def main(way: str, dimension: int, neighbours: int) -> None:
    """Round and mask one vector, and say what the process took at most."""
    update = np.full(dimension, 0.5, dtype=np.float32)
    keys = [n.to_bytes(32, "big") for n in range(neighbours + 1)]
    if way == "theirs":
        from masking.flower_secaggplus import mask

        mask(update, keys)
    else:
        import fedward.aggregation.site_session  # noqa: F401  # all that a session loads
        from fedward.aggregation.fixed_point import Grid, encode
        from fedward.aggregation.masks import Words, apply_masks
        from fedward.aggregation.rotation import rotate, rotated_grid
        from fedward.privacy.noise import SecureStream

        words: Words = np.empty(dimension, dtype=np.uint16 if way == "ours16" else np.uint32)
        if way == "ours16":
            turned = rotate(update, bytes(32))
            encode(turned, rotated_grid(8.0, dimension, sites=64), SecureStream(), out=words)
            del turned
        else:
            encode(update, Grid(clip=8.0, sites=64, word_bits=32), SecureStream(), out=words)
        apply_masks(words, add=keys[: len(keys) // 2], subtract=keys[len(keys) // 2 :])
    print(high_water())


def high_water() -> float:
    """MB: the largest resident size of this process since it was executed."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
