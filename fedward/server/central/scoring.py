"""What a model makes of every row of a file: likelihoods, labels, rewards, generations.

Which of them follows from the model's kind and from the columns that are there (:data:`WAYS`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rouge_score.rouge_scorer import RougeScorer

from fedward.errors import ConfigurationError, DataError, InvalidValue
from fedward.server.central.data import class_or_value, whole_rows
from fedward.server.central.inputs import answer_start, closed_ids, last_turn, open_ids, words
from fedward.server.central.job import Reward
from fedward.server.central.manifest import Kind
from fedward.server.central.opening import Opened
from fedward.server.central.predicting import input_ids, longest, say
from fedward.server.central.rewards import rule
from fedward.tuning.metrics import evaluate
from fedward.tuning.objectives import IGNORED, Encoded, Example
from fedward.tuning.records import check_column, read_table
from fedward.tuning.resampling import Units, units_of

Way = tuple[str, ...]
WAYS: Mapping[Kind, Sequence[Way]] = {
    "classifier": [("text", "label"), ("prompt", "label"), ("messages", "label")],
    "reward": [
        ("prompt", "chosen", "rejected"),
        ("chosen", "rejected"),
        ("prompt", "completion", "score"),
        ("messages", "score"),
        ("text", "score"),
    ],
    "language": [
        ("prompt", "chosen", "rejected"),
        ("prompt", "completion"),
        ("messages",),
        ("text",),
        ("prompt",),
    ],
}
"""The columns that a kind of model is evaluated on; the first way that the file has."""

ROUGE = ("rouge1", "rouge2", "rougeL")
_EXPECTED = "[reward] column"

Numbers = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is evaluated, and how.

    Args:
        data: JSONL, CSV or Parquet, the first two also with ``.gz``.
        columns: The name of :data:`WAYS` to the file's own name of a column.
        unit: A column whose rows belong together: a patient, a question.
        reward: A rule that generations are scored by (a pattern or a column).
        generate: Whether a language model also answers every prompt.
        batch_size: Rows at a time, 1 or more.
        max_new_tokens: Longest continuation, 1 or more.
    """

    data: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None
    reward: Reward | None = None
    generate: bool = True
    batch_size: int = 16
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a file, under the names of a way.

    Args:
        way: The columns, as :data:`WAYS` names them.
        values: One mapping a row; ``score``, where it is there, also beside pairs.
        places: For each row the words for where it stands.
        units: Which of them belong together.
    """

    way: Way
    values: Sequence[Mapping[str, Any]]
    places: Sequence[str]
    units: Units


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model made of every row.

    Args:
        numbers: Name to ``(n,)`` float64.
        texts: Name to n texts: what a model wrote.
        labels: Classes that ``truth`` and ``predicted`` number.
        cut: How many rows were longer than the model can read, and were cut.
    """

    numbers: Numbers
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    cut: int = 0


def read_rows(asked: Asked, kind: Kind) -> Rows:
    """Read a file for a kind of model.

    Raises:
        ConfigurationError: A name that no way has, or a rule for a model that writes nothing.
        DataError: The file cannot be read, is empty, lacks a column, or a row holds something else.
    """
    if asked.reward is not None and kind != "language":
        raise ConfigurationError(f"a {kind} model writes nothing that a rule could reward")
    table = read_table(asked.data)
    way, own = _way(asked, kind, table.columns)
    if way == ("prompt",) and asked.reward is None:
        raise DataError(f"{asked.data}: prompts alone need a rule for what is written: --reward")
    wanted = {name: own[name] for name in way}
    if kind == "reward" and own["score"] in table.columns:
        wanted["score"] = own["score"]
    extra = [asked.unit, None if asked.reward is None else asked.reward.column]
    for column in [*wanted.values(), *(name for name in extra if name is not None)]:
        check_column(column, table.columns, asked.data)
    found = list(whole_rows(table.rows, asked.data))
    values = [
        {name: _field(row.get(column), name, place) for name, column in wanted.items()}
        for row, place in found
    ]
    if asked.reward is not None and asked.reward.column is not None:
        for value, (row, place) in zip(values, found, strict=True):
            expected = row.get(asked.reward.column)
            if not isinstance(expected, str):
                raise DataError(f"{place}: column {asked.reward.column!r} must hold text")
            value[_EXPECTED] = expected
    names = [None if asked.unit is None else row.get(asked.unit) for row, _ in found]
    return Rows(
        way=way,
        values=values,
        places=[place for _, place in found],
        units=units_of(names),
    )


def _way(asked: Asked, kind: Kind, columns: Sequence[str]) -> tuple[Way, dict[str, str]]:
    """The first way that a file has, and the file's own name of each column."""
    ways = WAYS[kind]
    known = {name for way in ways for name in way} | {"score"}
    for name in asked.columns:
        if name not in known:
            raise InvalidValue("--map", name, f"one of {', '.join(sorted(known))}")
    own = {name: asked.columns.get(name, name) for name in known}
    for way in ways:
        if all(own[name] in columns for name in way):
            return way, own
    allowed = "; or ".join(", ".join(way) for way in ways)
    raise DataError(
        f"{asked.data}: a {kind} model needs the columns {allowed}; the file has "
        f"{', '.join(columns) or 'none'} (--map NAME=OWN names one otherwise)"
    )


def _field(value: object, name: str, place: str) -> Any:  # noqa: ANN401  # text, messages, number
    if name == "score":
        try:
            number = float(value)  # type: ignore[arg-type]  # a CSV's numbers are text
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{place}: column 'score' must hold a number")
        return number
    return class_or_value(value, name, place)


def score(opened: Opened, rows: Rows, asked: Asked, console: Console) -> Scores:
    """Let a model read, and where it writes, write, every row.

    Args:
        opened: The model.
        rows: Read for its kind.
        asked: How.
        console: Where progress is shown.

    Raises:
        ConfigurationError: Messages that the model's chat template refuses.
        DataError: A label that the model does not know, or a conversation without an answer.
    """
    reader = _Reader(opened, rows, asked)
    with Progress(console=console, transient=True) as progress:
        for first in progress.track(
            range(0, len(rows.values), asked.batch_size), description="evaluate"
        ):
            reader.read(range(first, min(first + asked.batch_size, len(rows.values))))
    numbers = {name: np.array(column) for name, column in reader.numbers.items()}
    if "score" in rows.values[0]:
        numbers["score"] = np.array([row["score"] for row in rows.values])
    return Scores(numbers=numbers, texts=reader.texts, labels=reader.labels, cut=reader.cut)


class _Reader:
    """Scores of the rows read so far."""

    def __init__(self, opened: Opened, rows: Rows, asked: Asked) -> None:
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.kind: Kind = opened.kind
        self.rows, self.asked = rows, asked
        self.most = longest(self.model, self.tokenizer)
        self.numbers = dict[str, list[float]]()
        self.texts = dict[str, list[str]]()
        self.cut = 0
        self.labels = tuple[str, ...]()
        self.rouge = RougeScorer(list(ROUGE))
        if self.kind == "classifier":
            self.labels = tuple(sorted(str(name) for name in self.model.config.id2label.values()))
            strange = {row["label"] for row in rows.values} - set(self.labels)
            if strange:
                raise DataError(
                    f"the model knows the labels {', '.join(self.labels)}, but the data has "
                    f"{', '.join(sorted(strange)[:5])}"
                )

    def read(self, numbers: range) -> None:
        """Score a batch of rows."""
        batch = [self.rows.values[number] for number in numbers]
        try:
            if self.kind == "classifier":
                self._classify(batch)
            elif self.kind == "reward":
                self._rate(batch)
            elif "chosen" in self.rows.way:
                self._prefer(batch)
            else:
                self._write(batch)
        except DataError as error:
            where = f"{self.rows.places[numbers.start]} and the {len(batch) - 1} after it"
            raise DataError(f"{where}: {error}") from error

    def _add(self, name: str, values: Sequence[float]) -> None:
        self.numbers.setdefault(name, []).extend(values)

    def _classify(self, batch: Sequence[Mapping[str, Any]]) -> None:
        inputs = [input_ids(row[self.rows.way[0]], self.tokenizer, self.kind) for row in batch]
        said = [str(label) for label in self._say(inputs)]
        truth = [str(row["label"]) for row in batch]
        self._add("truth", [self.labels.index(label) for label in truth])
        self._add("predicted", [self.labels.index(label) for label in said])
        self._add("correct", [float(a == b) for a, b in zip(truth, said, strict=True)])
        self.texts.setdefault("prediction", []).extend(said)

    def _rate(self, batch: Sequence[Mapping[str, Any]]) -> None:
        def rate(answer: str) -> list[float]:
            answers = [closed_ids(row.get("prompt"), row[answer], self.tokenizer) for row in batch]
            return [float(x) for x in self._say(answers)]

        if "chosen" in self.rows.way:
            self._pairs(rate("chosen"), rate("rejected"))
        else:
            self._add("rating", rate(self.rows.way[-2]))

    def _prefer(self, batch: Sequence[Mapping[str, Any]]) -> None:
        chosen, rejected = (
            [-nll for nll, _, _ in self._likelihoods([(row["prompt"], row[key]) for row in batch])]
            for key in ("chosen", "rejected")
        )
        self._pairs(chosen, rejected)

    def _pairs(self, chosen: Sequence[float], rejected: Sequence[float]) -> None:
        margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
        self._add("chosen", chosen)
        self._add("rejected", rejected)
        self._add("margin", margins)
        self._add("preferred", [float(margin > 0) for margin in margins])

    def _write(self, batch: Sequence[Mapping[str, Any]]) -> None:
        asked = [_question(row, self.rows.way) for row in batch]
        known = [(prompt, answer) for prompt, answer in asked if answer is not None]
        if known:
            found = self._likelihoods(known)
            for place, name in enumerate(("nll", "tokens", "bytes")):
                self._add(name, [each[place] for each in found])
        prompts = [prompt for prompt, _ in asked if prompt is not None]
        if not self.asked.generate or not prompts:
            return
        opened = [open_ids(prompt, self.tokenizer) for prompt in prompts]
        said = [str(text) for text in self._say(opened)]
        self.texts.setdefault("generation", []).extend(said)
        if known:
            wanted = [words(answer) for _, answer in known]
            scored = [self.rouge.score(a, b) for a, b in zip(wanted, said, strict=True)]
            for name in ROUGE:
                self._add(name, [each[name].fmeasure for each in scored])
        if self.asked.reward is not None:
            columns = {str(self.asked.reward.column): [row.get(_EXPECTED) for row in batch]}
            self._add("reward", rule(self.asked.reward)(completions=said, **columns))

    def _say(self, inputs: Sequence[list[int]]) -> list[str | float]:
        self.cut += sum(len(ids) > self.most for ids in inputs)
        new = self.asked.max_new_tokens
        return say(self.model, self.tokenizer, self.kind, inputs, new)

    def _likelihoods(self, pairs: Sequence[tuple[Any, Any]]) -> list[tuple[float, float, float]]:
        """For each answer: its negative log likelihood after its prompt, its tokens, its bytes."""
        examples = list[Example]()
        for prompt, answer in pairs:
            closed = closed_ids(prompt, answer, self.tokenizer)
            opened = [] if prompt is None else open_ids(prompt, self.tokenizer)
            start = max(1, answer_start(opened, closed))  # nothing foretells a first token
            self.cut += len(closed) > self.most
            tokens = closed[: self.most]
            targets = [IGNORED] * min(start, len(tokens)) + tokens[start:]
            examples.append(Example(tokens=tuple(tokens), targets=tuple(targets)))
        padding = self.tokenizer.pad_token_id
        encoded = Encoded(examples=tuple(examples), padding=padding, classify=False)
        losses = evaluate(self.model, encoded, batch_size=len(examples)).losses
        learned = [[t for t in each.targets if t != IGNORED] for each in examples]
        texts = self.tokenizer.batch_decode(learned, skip_special_tokens=True)
        return [
            (float(loss) * len(ids), float(len(ids)), float(len(text.encode())))
            for loss, ids, text in zip(losses, learned, texts, strict=True)
        ]


def _question(row: Mapping[str, Any], way: Way) -> tuple[Any, Any]:
    """What is asked and what is the right answer; None where there is none."""
    if way == ("messages",):
        return last_turn(row["messages"])
    if way == ("text",):
        return None, row["text"]
    return row["prompt"], row.get("completion")
