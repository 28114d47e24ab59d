"""The site's own limits. The site's word is the last: what its policy refuses is not trained."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Literal

from fedward import typed_toml
from fedward.canonical import canonical_json, digest
from fedward.client.data_sources import DataSource
from fedward.client.hours import parse_window
from fedward.errors import InvalidValue, PolicyRefusal
from fedward.plan import Plan

EMBEDDINGS = (
    "embed_in",
    "embed_out",
    "embed_positions",
    "embed_tokens",
    "embeddings",
    "lm_head",
    "position_embeddings",
    "tok_embeddings",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
)
"""Token embeddings and output layers by the names that models give them: a trained row tells which
words occur in the notes."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a site allows; read from TOML, without defaults that allow anything.

    A range is a list of two numbers, both allowed; left out, the plan's own limits hold.

    Args:
        max_epsilon: Most that one patient may ever lose here, over all runs, > 0; ``inf`` only in
            a simulation.
        delta: The delta at which ``max_epsilon`` holds, above 0 and below 0.1.
        max_rounds: Most rounds (count + spare) of one run, at least 1.
        models: SHA-256 digests of the base models that may be trained.
        modes: Accepted modes of training together.
        objectives: Accepted objectives.
        methods: Accepted PEFT methods.
        frozen: Names of modules that no plan may train.
        heads: The only modules that a plan may train whole (``modules_to_save``).
        quantize: Accepted ways of holding the frozen base.
        datasets: Names of the data sources that may be trained on; with several, each approval
            names one.
        units: Whom the data sources may protect: ``patient``, and ``record`` where single records
            are enough.
        minimum: Fewest sites in a sum, at least 3.
        colluders: Colluding sites that the plan must allow for, 0 or more.
        clip: Range of the plan's ``clip``.
        normaliser: Range of the plan's ``normaliser``.
        learning_rate: Range of the plan's ``learning_rate``.
        update_clip: Range of the plan's ``update_clip``.
        sampling_rate: Range of the plan's ``sampling_rate``.
        max_steps: Most local steps a round, at least 1.
        max_length: Most tokens of an example, at least 8.
        max_records_per_unit: Most of the plan's ``records_per_unit``, at least 1.
        max_letter: Most MiB of one letter of the coordinator's, at least 1: the adapter, and
            beside it the last sum.
        gpu_memory: Most GiB of GPU memory that the trainer takes, above 0.
        every_sum: Whether the site refuses to go on after rounds whose sums it could not check,
            because it was away or was told of none.
        hours: Windows of local time in which a round may start, like ``mon-fri 20:00-06:00``;
            empty: always.
        signers: Ed25519 keys (hex); one of them must have signed a plan at its approval. Empty: the
            coordinator's signature is enough.
        permit: The permit under which the site takes part, written into the journal.
        permit_until: Last day of the permit, ``YYYY-MM-DD``; afterwards nothing is trained.
        automatic: Whether a plan within these limits needs no approval of its own.
        automatic_roster: Whether a newer roster that the coordinator signed needs no approval.
    """

    max_epsilon: float
    delta: float
    max_rounds: int
    models: tuple[str, ...]
    modes: tuple[str, ...] = ("local",)
    objectives: tuple[str, ...] = ("sft", "classify")
    methods: tuple[str, ...] = ("lora",)
    frozen: tuple[str, ...] = EMBEDDINGS
    heads: tuple[str, ...] = ("score", "classifier")
    quantize: tuple[str, ...] = ("none", "nf4", "int8")
    datasets: tuple[str, ...] = ()
    units: tuple[Literal["patient", "record"], ...] = ("patient",)
    minimum: int = 3
    colluders: int = 0
    clip: tuple[float, ...] = (0.0, math.inf)
    normaliser: tuple[float, ...] = (0.0, math.inf)
    learning_rate: tuple[float, ...] = (0.0, math.inf)
    update_clip: tuple[float, ...] = (0.0, math.inf)
    sampling_rate: tuple[float, ...] = (0.0, 1.0)
    max_steps: int = 10000
    max_length: int = 131072
    max_records_per_unit: int = 1000
    max_letter: int = 1024
    gpu_memory: float | None = None
    every_sum: bool = False
    hours: tuple[str, ...] = ()
    signers: tuple[str, ...] = ()
    permit: str | None = None
    permit_until: str | None = None
    automatic: bool = False
    automatic_roster: bool = False

    def __post_init__(self) -> None:
        """Check every limit."""
        if not self.max_epsilon > 0:
            raise InvalidValue("max_epsilon", self.max_epsilon, "a number above 0")
        if not 0 < self.delta < 0.1:
            raise InvalidValue("delta", self.delta, "above 0 and below 0.1")
        if self.gpu_memory is not None and not self.gpu_memory > 0:
            raise InvalidValue("gpu_memory", self.gpu_memory, "GiB above 0")
        ones = ("max_rounds", "max_steps", "max_records_per_unit", "max_letter")
        lowest = {"minimum": 3, "colluders": 0, "max_length": 8, **dict.fromkeys(ones, 1)}
        for key, low in lowest.items():
            if vars(self)[key] < low:
                raise InvalidValue(key, vars(self)[key], f"at least {low}")
        self._check_lists()

    def _check_lists(self) -> None:
        for key in ("clip", "normaliser", "learning_rate", "update_clip", "sampling_rate"):
            bounds = vars(self)[key]
            if len(bounds) != 2 or not bounds[0] <= bounds[1]:
                raise InvalidValue(key, list(bounds), "two numbers, the smaller first")
        for key in ("models", "signers"):
            for item in vars(self)[key]:
                if not re.fullmatch("[0-9a-f]{64}", item):
                    raise InvalidValue(key, item, "64 lower-case hex digits")
        for window in self.hours:
            parse_window(window)
        if self.permit_until is not None:
            _day(self.permit_until)

    def hash(self) -> bytes:
        """32 bytes that an approval binds: any change of the policy asks for a new one."""
        return digest("policy", canonical_json(dataclasses.asdict(self)))

    def check(self, plan: Plan, now: datetime | None = None) -> None:
        """Compare a plan with every limit; approval is :class:`~fedward.client.approval.Consent`'s.

        Args:
            plan: The plan.
            now: Local time; the clock's where it is left out.

        Raises:
            PolicyRefusal: With every reason at once.
        """
        reasons = list(self.reasons(plan, now))
        if reasons:
            raise PolicyRefusal(reasons)

    def reasons(self, plan: Plan, now: datetime | None = None) -> Iterator[str]:
        """Every reason against a plan, each a sentence."""
        now = datetime.now().astimezone() if now is None else now
        yield from self._spending(plan)
        yield from self._training(plan)
        yield from self._trained_modules(plan)
        yield from self._time(now)

    def source_reasons(self, plan: Plan, source: DataSource) -> Iterator[str]:
        """Every reason against training a plan on a data source."""
        if source.unit_is_record and "record" not in self.units:
            yield "the data source protects single records, and 'record' is not in units"
        for column in source.undeclared(plan):
            yield f"it reads column {column!r}, which the data source does not declare"

    def _spending(self, plan: Plan) -> Iterator[str]:
        privacy, rounds, cohort = plan.privacy, plan.rounds, plan.cohort
        epsilon = privacy.epsilon + (plan.metrics.epsilon if plan.metrics else 0.0)
        if epsilon > self.max_epsilon:
            yield f"epsilon {epsilon:g} is above max_epsilon = {self.max_epsilon:g}"
        if privacy.delta > self.delta:
            yield f"delta {privacy.delta:g} is above delta = {self.delta:g}"
        if rounds.count + rounds.spare > self.max_rounds:
            total = rounds.count + rounds.spare
            yield f"{total} rounds with spares are above max_rounds = {self.max_rounds}"
        if cohort.minimum < self.minimum:
            yield f"a cohort of {cohort.minimum} is below minimum = {self.minimum}"
        if self.every_sum and rounds.participants is not None:
            yield "it would sit out rounds whose sums it cannot check, and every_sum is on"
        if cohort.colluders < self.colluders:
            yield f"{cohort.colluders} colluders are below colluders = {self.colluders}"

    def _training(self, plan: Plan) -> Iterator[str]:
        if plan.model.sha256 not in self.models:
            yield f"the base model {plan.model.sha256} is not in models"
        for name, value, key in (
            ("mode", plan.mode, "modes"),
            ("objective", plan.task.objective, "objectives"),
            ("method", plan.tuner.method, "methods"),
            ("quantisation", plan.model.quantize, "quantize"),
        ):
            if value not in vars(self)[key]:
                yield f"{name} {value!r} is not in {key}"
        for key, number in (
            ("clip", plan.privacy.clip),
            ("normaliser", plan.rounds.normaliser),
            ("learning_rate", plan.rounds.learning_rate),
            ("update_clip", plan.aggregation.update_clip),
            ("sampling_rate", plan.rounds.sampling_rate),
        ):
            low, high = vars(self)[key]
            if not low <= number <= high:
                yield f"{key} {number:g} is not in {low:g} to {high:g}"
        for what, count, key in (
            ("steps a round", plan.rounds.steps, "max_steps"),
            ("tokens", plan.task.max_length, "max_length"),
            ("records of a unit", plan.privacy.records_per_unit, "max_records_per_unit"),
        ):
            if count > vars(self)[key]:
                yield f"{count} {what} are above {key} = {vars(self)[key]}"

    def _trained_modules(self, plan: Plan) -> Iterator[str]:
        """What the plan would train, as far as its words tell; the trainer checks the model too."""
        given = plan.tuner.arguments
        targets = given.get("target_modules", "all-linear")
        if isinstance(targets, str) and targets != "all-linear":
            yield "target_modules is a pattern; expected a list of names, or 'all-linear'"
        named = [] if isinstance(targets, str) else _names(targets)
        for name in [*named, *_names(given.get("target_parameters"))]:
            if set(name.split(".")) & set(self.frozen):
                yield f"it would train {name!r}, which is in frozen"
        for name in _names(given.get("modules_to_save")):
            if name.rpartition(".")[2] not in self.heads:
                yield f"it would train {name!r} whole, which is not in heads"
        yield from _patterns(given)
        if given.get("trainable_token_indices") and self.frozen:
            yield "it would train token embeddings (trainable_token_indices)"

    def _time(self, now: datetime) -> Iterator[str]:
        if self.hours and not any(parse_window(text).contains(now) for text in self.hours):
            yield f"it is {now:%a %H:%M} here, outside of hours = {', '.join(self.hours)}"
        if self.permit_until is not None and now.date() > _day(self.permit_until):
            yield f"the permit {self.permit or ''} ended on {self.permit_until}"


def _names(value: object) -> list[str]:
    """PEFT takes one name, a list of them, or nothing; another value is refused by name."""
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _patterns(given: Mapping[str, object]) -> Iterator[str]:
    """PEFT takes many of its names for patterns, and some patterns never come to an end."""
    for key, value in given.items():
        if key == "target_modules" and isinstance(value, str):
            continue  # refused as a pattern already
        for text in _texts(value):
            if not re.fullmatch(r"[\w.-]{1,200}", text, re.ASCII):
                yield f"{key} holds {text!r}; expected plain names"


def _texts(value: object) -> Iterator[str]:
    """Every text in a value of a plan, keys of tables included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InvalidValue("permit_until", text, "a day as YYYY-MM-DD") from error


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigurationError: Missing file (no policy, no training), or an invalid value.
    """
    return typed_toml.load(Policy, path)
