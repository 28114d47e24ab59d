"""The space of a search: which keys of a job are tried with which values.

Keys stand as in the job, and each names one way to draw its value. The draws follow from the seed
alone, so that an interrupted search goes on with the same ones.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from fedward import typed_toml
from fedward.errors import ConfigurationError, InvalidValue, require

Key: TypeAlias = tuple[str, ...]
"""Sections and key, as ``("train", "learning_rate")``."""

SECTIONS = ("tuner", "train", "keep", "stop")

_DRAWS: Mapping[str, Callable[[np.random.Generator, Any], Any]] = {
    "choice": lambda generator, given: given[int(generator.integers(len(given)))],
    "uniform": lambda generator, given: float(generator.uniform(*given)),
    "loguniform": lambda generator, given: math.exp(
        generator.uniform(math.log(given[0]), math.log(given[1]))
    ),
    "randint": lambda generator, given: int(generator.integers(given[0], given[1] + 1)),
}
"""How a value is drawn: one of a list, or between two ends, both included."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """``[space]``: sections and keys of the job, each with a draw.

    Args:
        keys: As in the file.
    """

    keys: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={typed_toml.REST: True}
    )

    def __post_init__(self) -> None:
        """Check every draw."""
        if not self.draws():
            raise ConfigurationError("[space] expected keys of the job, as train.learning_rate")

    def draws(self) -> dict[Key, tuple[str, Any]]:
        """Each key with how it is drawn and from what."""
        found = dict[Key, tuple[str, Any]]()
        for key, value in self.keys.items():
            if key == "seed":
                found[(key,)] = _draw((key,), value)
            elif key not in SECTIONS or not isinstance(value, Mapping):
                raise InvalidValue("[space]", key, f"seed or a section: {', '.join(SECTIONS)}")
            else:
                found |= {(key, inner): _draw((key, inner), v) for inner, v in value.items()}
        return found


@dataclass(frozen=True, kw_only=True)
class Search:
    """A file of ``--search``.

    Args:
        space: What is tried.
        trials: How many draws, 1 or more.
        metric: What a trainer logs at each evaluation, by which trials are judged.
        mode: Whether less or more of it is better.
        workers: Trials at a time, 1 or more.
        grace: Evaluations before a trial may be stopped, 1 or more.
        reduction: Of so many trials at an evaluation one goes on, 2 or more.
        seed: Of the draws, 0 to 2^32 - 1.
    """

    space: Space
    trials: int = 10
    metric: str = "eval_loss"
    mode: Literal["min", "max"] = "min"
    workers: int = 1
    grace: int = 1
    reduction: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every limit."""
        for key, least in (("trials", 1), ("workers", 1), ("grace", 1), ("reduction", 2)):
            value: int = vars(self)[key]
            require(value >= least, key, value, f"{least} or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        holds = self.metric.startswith("eval_")
        require(holds, "metric", self.metric, "a name that begins with eval_")

    def drawn(self) -> list[dict[Key, Any]]:
        """The values of every trial."""
        generator = np.random.default_rng(self.seed)
        draws = self.space.draws()
        return [
            {path: _DRAWS[how](generator, given) for path, (how, given) in draws.items()}
            for _ in range(self.trials)
        ]


def _draw(path: Key, value: object) -> tuple[str, Any]:
    """A draw, checked."""
    key = ".".join(path)
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in _DRAWS:
        raise InvalidValue(f"[space] {key}", value, f"one of {{ {', '.join(_DRAWS)} = [...] }}")
    ((how, given),) = value.items()
    if how == "choice":
        holds, allowed = isinstance(given, list) and bool(given), "a list of values"
    else:
        kinds = (int,) if how == "randint" else (int, float)
        holds = (
            isinstance(given, list)
            and [type(end) in kinds for end in given] == [True, True]
            and given[0] < given[1]
            and (how != "loguniform" or given[0] > 0)
        )
        numbers = "whole numbers" if how == "randint" else "numbers"
        allowed = f"two {numbers}, the smaller first"
        allowed += ", above 0" if how == "loguniform" else ""
    if not holds:
        raise InvalidValue(f"[space] {key}: {how}", given, allowed)
    return how, given
