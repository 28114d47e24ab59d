"""The job: the TOML file of one central training, as frozen dataclasses.

A job is one step, or several that build on each other (``[[steps]]``): where a step says
``step:NAME`` it means the model that the earlier step of that name made. Keys of TRL and PEFT keep
their names. A job is data: it names no code.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fedward import typed_toml
from fedward.errors import ConfigurationError, InvalidValue, require
from fedward.plan import Model

Stage = Literal["sft", "reward", "dpo", "kto", "orpo", "grpo", "rloo", "ppo", "distill"]
STAGES: tuple[Stage, ...] = get_args(Stage)
REWARDED = ("grpo", "rloo", "ppo")
"""Stages that learn from a reward."""

STEP = "step:"
"""What stands before the name of an earlier step, in place of a model's path."""

_NAME = r"[a-z0-9][a-z0-9-]{0,63}"


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, bool | int | float | str)


def _check_plain(arguments: Mapping[str, Any]) -> None:
    for key, value in arguments.items():
        require(_is_plain(value), key, value, "text, numbers, true, false, or lists of them")


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """``[tuner]``: the tuner; every other key is passed to PEFT unrenamed.

    Args:
        method: A name of the table of tuners.
        arguments: Keys of PEFT's configuration of that method, for example ``r``.
    """

    method: str = "lora"
    arguments: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={typed_toml.REST: True}
    )

    def __post_init__(self) -> None:
        """Check every limit."""
        _check_plain(self.arguments)


@dataclass(frozen=True, kw_only=True)
class Data:
    """``[data]``: the files, and which of their columns is what.

    Args:
        train: JSONL, CSV or Parquet, the first two also with ``.gz``.
        evaluation: Held-out records of the same form.
        columns: The stage's name of a column to the file's own name of it.
    """

    train: str
    evaluation: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """``[reward]``: what a completion is worth (``grpo``, ``rloo`` and ``ppo``); one of the three.

    Args:
        path: A model that the stage ``reward`` made, or ``step:NAME``.
        pattern: A regular expression: 1 where it is found in the completion, else 0.
        column: A column of the data: 1 where its text is found in the completion, else 0.
    """

    path: str | None = None
    pattern: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        given = [key for key, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ConfigurationError(f"expected one of path, pattern and column, got {given}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigurationError(f"pattern: not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Stop:
    """``[stop]``: end when the evaluation gets no better, and keep the best model.

    Args:
        patience: Evaluations in a row that are no better, 1 or more.
        threshold: How much better counts, 0 or more.
    """

    patience: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check every limit."""
        require(self.patience >= 1, "patience", self.patience, "1 or more")
        require(0 <= self.threshold < float("inf"), "threshold", self.threshold, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Train:
    """``[train]``: how to train; every key is one of TRL's configuration of the stage.

    Args:
        arguments: For example ``max_steps``, ``learning_rate``, ``lr_scheduler_type``,
            ``per_device_train_batch_size``, ``gradient_accumulation_steps``, ``eval_strategy``.
    """

    arguments: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={typed_toml.REST: True}
    )

    def __post_init__(self) -> None:
        """Check every limit."""
        _check_plain(self.arguments)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training. A job without ``[[steps]]`` is one of these itself.

    Args:
        name: Lower-case letters, digits and dashes.
        stage: What is learned.
        seed: Of new weights, order and dropout, 0 to 2^32 - 1.
        teacher: ``distill``: the model to learn from, a path or ``step:NAME``.
    """

    name: str
    stage: Stage
    model: Model
    data: Data
    seed: int = 0
    tuner: Tuner = field(default_factory=Tuner)
    train: Train = field(default_factory=Train)
    reward: Reward | None = None
    stop: Stop | None = None
    teacher: str | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        holds = re.fullmatch(_NAME, self.name) is not None
        require(holds, "name", self.name, "1 to 64 of a-z, 0-9 and '-'")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        needed = self.stage in REWARDED
        if needed is (self.reward is None):
            verb = "needs" if needed else "has no"
            raise ConfigurationError(f"the stage {self.stage!r} {verb} section [reward]")
        if (self.stage == "distill") is (self.teacher is None):
            verb = "needs" if self.stage == "distill" else "has no"
            raise ConfigurationError(f"the stage {self.stage!r} {verb} key 'teacher'")
        if self.stop is not None and self.data.evaluation is None:
            raise ConfigurationError("[stop] needs [data] evaluation, to see what gets better")

    def needs(self) -> list[str]:
        """The models that it starts from: paths, or ``step:NAME``."""
        reward = None if self.reward is None else self.reward.path
        return [path for path in (self.model.path, reward, self.teacher) if path is not None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole job.

    Args:
        name: Lower-case letters, digits and dashes.
        steps: What is trained, in order, each with a name of its own.
    """

    name: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Check every limit."""
        holds = re.fullmatch(_NAME, self.name) is not None
        require(holds, "name", self.name, "1 to 64 of a-z, 0-9 and '-'")
        done = list[str]()
        for step in self.steps:
            require(step.name not in done, "name", step.name, "another name for each step")
            for path in step.needs():
                before = path.removeprefix(STEP)
                if path.startswith(STEP) and before not in done:
                    allowed = f"an earlier step: {', '.join(done) or 'this is the first'}"
                    raise InvalidValue(f"[[steps]] {step.name}: model", path, allowed)
            done.append(step.name)
        require(bool(done), "steps", [], "at least one")


def load_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        ConfigurationError: Names file, section, key, value and what is allowed.
    """
    try:
        several = "steps" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        several = True  # the loader below says what is wrong
    if several:
        return typed_toml.load(Job, path)
    step = typed_toml.load(Step, path)
    return Job(name=step.name, steps=(step,))
