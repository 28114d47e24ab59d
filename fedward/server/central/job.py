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

Stage = Literal["sft", "classify", "reward", "dpo", "kto", "orpo", "grpo", "rloo", "ppo", "distill"]
STAGES: tuple[Stage, ...] = get_args(Stage)
REWARDED = ("grpo", "rloo", "ppo")
"""Stages that learn from a reward."""

STEP = "step:"
"""What stands before the name of an earlier step, in place of a model's path."""

_NAME = r"[a-z0-9][a-z0-9-]{0,63}"


Combination = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""PEFT's ways to make several LoRA adapters into one."""


def _check_name(name: str) -> None:
    holds = re.fullmatch(_NAME, name) is not None
    require(holds, "name", name, "1 to 64 of a-z, 0-9 and '-'")


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
class Log:
    """``[log]``: who else shows what a training logs, in the job's own folder.

    Args:
        to: ``tensorboard``, ``mlflow`` or both.
    """

    to: tuple[Literal["tensorboard", "mlflow"], ...] = ()


LIKELIHOODS = ("sft", "classify", "reward", "dpo")
"""Stages whose loss is a negative log likelihood, as EWC's Fisher information wants it."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """``[keep]``: what the model shall not forget, and by which means.

    Args:
        data: Rows of what it knew, in the columns of the stage; for ``replay`` and ``ewc``.
        evaluation: Held-out ones; the report says what the model scores there before and after.
        replay: Share of the rows trained on that are old, 0 to below 1.
        l2_sp: Pull of every trained parameter to its start, 0 or more.
        ewc: The same by how much the old rows need the parameter, 0 or more; that need is 1 on
            average.
        ewc_examples: How many old rows say what they need, 1 or more.
    """

    data: str | None = None
    evaluation: str | None = None
    replay: float = 0.0
    l2_sp: float = 0.0
    ewc: float = 0.0
    ewc_examples: int = 256

    def __post_init__(self) -> None:
        """Check every limit."""
        require(0 <= self.replay < 1, "replay", self.replay, "0 to below 1")
        for key in ("l2_sp", "ewc"):
            weight: float = vars(self)[key]
            require(0 <= weight < float("inf"), key, weight, "0 or more")
        require(self.ewc_examples >= 1, "ewc_examples", self.ewc_examples, "1 or more")
        if (self.replay or self.ewc) and self.data is None:
            raise ConfigurationError("[keep] replay and ewc need data: rows of what it knew")
        if not (self.replay or self.ewc or self.l2_sp or self.evaluation):
            raise ConfigurationError("[keep] expected replay, l2_sp, ewc or evaluation")


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
    keep: Keep | None = None
    log: Log = field(default_factory=Log)
    teacher: str | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        _check_name(self.name)
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
        if self.keep is not None and self.keep.ewc and self.stage not in LIKELIHOODS:
            raise ConfigurationError(
                f"[keep] ewc goes with the stages {', '.join(LIKELIHOODS)}: the loss of "
                f"{self.stage!r} is no likelihood of given answers"
            )

    def needs(self) -> list[str]:
        """The models that it starts from: paths, or ``step:NAME``."""
        reward = None if self.reward is None else self.reward.path
        return [path for path in (self.model.path, reward, self.teacher) if path is not None]

    def files(self) -> list[str]:
        """The files that it reads."""
        kept = (None, None) if self.keep is None else (self.keep.data, self.keep.evaluation)
        return [path for path in (self.data.train, self.data.evaluation, *kept) if path is not None]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """``[[merges]]``: several LoRA adapters of one base made into one.

    Args:
        name: Lower-case letters, digits and dashes.
        models: Two or more adapters that jobs made, each a path or ``step:NAME``.
        weights: Of each; left out: one over their number.
        how: PEFT's combination type. ``cat`` and ``svd`` of full rank are exact; ``linear``
            averages the factors in place of their products.
        density: Share of the entries that TIES, DARE and pruning keep, above 0 to 1.
        rank: Of what ``svd`` leaves, 1 or more; left out: the largest of theirs.
        seed: Of DARE's choice, 0 to 2^32 - 1.
    """

    name: str
    models: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    how: Combination = "svd"
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every limit."""
        _check_name(self.name)
        require(len(self.models) >= 2, "models", list(self.models), "two or more adapters")
        given = None if self.weights is None else list(self.weights)
        holds = given is None or len(given) == len(self.models)
        require(holds, "weights", given, f"{len(self.models)} numbers, one for each model")
        thins = self.how.startswith(("ties", "dare", "magnitude"))
        if thins is (self.density is None):
            raise ConfigurationError(f"how = {self.how!r} {'needs' if thins else 'has no'} density")
        require(self.density is None or 0 < self.density <= 1, "density", self.density, "0 to 1")
        require(self.rank is None or self.rank >= 1, "rank", self.rank, "1 or more")
        holds = self.rank is None or self.how.endswith("svd")
        require(holds, "rank", self.rank, "none unless how ends in svd")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")

    def needs(self) -> list[str]:
        """The models that it is made of: paths, or ``step:NAME``."""
        return list(self.models)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole job.

    Args:
        name: Lower-case letters, digits and dashes.
        steps: What is trained, in order, each with a name of its own.
        merges: What is made of their results, each as soon as its models are there.
    """

    name: str
    steps: tuple[Step, ...] = ()
    merges: tuple[Merge, ...] = ()

    def __post_init__(self) -> None:
        """Check every limit."""
        _check_name(self.name)
        done = list[str]()
        for step in self.order():
            require(step.name not in done, "name", step.name, "another name for each step")
            for path in step.needs():
                before = path.removeprefix(STEP)
                if path.startswith(STEP) and before not in done:
                    allowed = f"an earlier step: {', '.join(done) or 'this is the first'}"
                    raise InvalidValue(f"{step.name}: model", path, allowed)
            done.append(step.name)
        require(bool(done), "steps", [], "at least one")

    def order(self) -> list[Step | Merge]:
        """Steps and merges in the order in which they are made."""
        made, waiting = list[Step | Merge](), list(self.merges)
        for step in (None, *self.steps):
            if step is not None:
                made.append(step)
            for merge in tuple(waiting):
                there = {STEP + each.name for each in made}
                if all(path in there or not path.startswith(STEP) for path in merge.models):
                    made.append(merge)
                    waiting.remove(merge)
        return [*made, *waiting]


def load_job(path: Path) -> Job:
    """Read and check a job file.

    Raises:
        ConfigurationError: Names file, section, key, value and what is allowed.
    """
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8")).keys()
        several = bool(keys & {"steps", "merges"})
    except (OSError, ValueError, RecursionError):
        several = True  # the loader below says what is wrong
    if several:
        return typed_toml.load(Job, path)
    step = typed_toml.load(Step, path)
    return Job(name=step.name, steps=(step,))
