"""The parts of a plan that say what is learned, and of which records (DESIGN §7)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fedward import typed_toml
from fedward.errors import require

_LATER = {typed_toml.LATER: True}


@dataclass(frozen=True, kw_only=True)
class Task:
    """``[task]``: the objective.

    Args:
        objective: ``sft`` (causal language modelling), ``classify``, ``dpo`` (of two answers prefer
            one) or ``kto`` (single answers, desirable or not).
        max_length: Tokens kept of one example, 8 to 131072; of each answer with its prompt.
        labels: The classes of ``classify`` in order. Public by nature: sites never derive them
            from their data. A simulation fills them in from all of its data.
        beta: How hard ``dpo`` and ``kto`` hold the model to the reference, which is the model as
            the plan starts it; above 0 and at most 100.
        desirable_weight: Weight of a desirable answer's loss (``kto``), above 0 and at most 100.
        undesirable_weight: Weight of an undesirable answer's loss (``kto``), as above.
    """

    objective: Literal["sft", "classify", "dpo", "kto"] = "sft"
    max_length: int = 512
    labels: tuple[str, ...] = ()
    beta: float = field(default=0.1, metadata=_LATER)
    desirable_weight: float = field(default=1.0, metadata=_LATER)
    undesirable_weight: float = field(default=1.0, metadata=_LATER)

    def __post_init__(self) -> None:
        """Check every limit."""
        require(8 <= self.max_length <= 131072, "max_length", self.max_length, "8 to 131072 tokens")
        unique = len(set(self.labels)) == len(self.labels) != 1
        require(unique, "labels", list(self.labels), "at least two classes, each once")
        for key, objectives in (
            ("beta", ("dpo", "kto")),
            ("desirable_weight", ("kto",)),
            ("undesirable_weight", ("kto",)),
        ):
            value = float(vars(self)[key])
            require(0 < value <= 100, key, value, "above 0 and at most 100")
            used = self.objective in objectives or value == vars(Task)[key]
            require(used, key, value, f"none: it belongs to {' and '.join(objectives)}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """``[data] split``: makes sites out of one data set, in simulation only.

    Args:
        by: The column whose values are dealt unevenly, usually the label.
        alpha: Dirichlet concentration, > 0; small is uneven.
        sites: Number of sites, 3 to 10000 (no sum has fewer than three).
        seed: Seed of the split.
    """

    by: str
    alpha: float
    sites: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every limit."""
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "a number above 0")
        require(3 <= self.sites <= 10000, "sites", self.sites, "3 to 10000")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Data:
    """``[data]``: which columns hold what; a site may map its own names onto these.

    Args:
        text: Column of the input text.
        label: Column of the class (``classify``), or of whether the answer is desirable, true or
            false (``kto``).
        messages: Column of chat messages (``sft``), rendered with the model's chat template.
        prompt: Column of the prompt; only what follows it is then learned.
        completion: Column of the completion (``sft``, ``kto``).
        chosen: Column of the better answer (``dpo``).
        rejected: Column of the other answer (``dpo``).
        template: Text with ``{column}`` fields that replaces ``text`` (or ``prompt``).
        unit: Column naming whom privacy protects, usually the patient. Left out, each row is a
            unit of its own.
        site: Column that makes the sites, in simulation only.
        split: Makes sites by a Dirichlet split, in simulation only.
    """

    text: str = "text"
    label: str = "label"
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = field(default=None, metadata=_LATER)
    rejected: str | None = field(default=None, metadata=_LATER)
    template: str | None = None
    unit: str | None = None
    site: str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        pair = (self.chosen is None) == (self.rejected is None)
        require(pair, "chosen", self.chosen, "chosen and rejected together, or neither")
        answers = (self.completion is not None) + (self.chosen is not None)
        paired = answers == (self.prompt is not None)
        allowed = "prompt with completion, or with chosen and rejected, or none of them"
        require(paired, "prompt", self.prompt, allowed)
        one = self.messages is None or self.prompt is None
        require(one, "messages", self.messages, "either messages or prompt and completion")
        one = self.site is None or self.split is None
        require(one, "split", self.split, "either site or split")
