"""The plan: what a run trains and with what privacy, as frozen dataclasses (DESIGN §7).

Every limit of a value stands in this module. What decides the privacy guarantee (rates, clips,
counts, epsilon, delta) is a public constant here and is never derived from a site's data.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedward import typed_toml
from fedward.canonical import Json, canonical_json, digest
from fedward.errors import ConfigurationError, require
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_fallback import Fallback
from fedward.plan_gate import Gate
from fedward.plan_task import Data as Data
from fedward.plan_task import Split as Split
from fedward.plan_task import Task as Task
from fedward.plan_tuner import LORA
from fedward.plan_tuner import Tuner as Tuner

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Model:
    """``[model]``: the frozen base model.

    Args:
        path: A folder, a hub id where sites allow downloads, or ``package:NAME`` for the weights in
            an installed Python package.
        sha256: Hex digest over weights, configuration and tokenizer; sites refuse another model.
            A run fills it in when it starts.
        quantize: How the frozen base is held: ``none``, ``nf4`` or ``int8`` (bitsandbytes).
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping
            them: less memory, about a third more time, the same update.
    """

    path: str
    sha256: str | None = None
    quantize: Literal["none", "nf4", "int8"] = "none"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check every limit."""
        require(bool(self.path), "path", self.path, "a folder or hub id")
        if self.sha256 is not None:
            holds = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
            require(holds, "sha256", self.sha256, "64 lower-case hex digits")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """``[rounds]``: how long and how fast a run trains. All are public constants.

    Args:
        count: Rounds that must complete, 1 to 100000.
        spare: Lost rounds that may be repeated, 0 to 100000; the noise covers count + spare.
        steps: Local optimizer steps a round, 1 to 10000.
        sampling_rate: Poisson rate of every unit, 0 < rate <= 1, the same at every site.
        normaliser: Clipped sums are divided by this constant, > 0, whatever was drawn.
        learning_rate: Step size of the local optimizer, > 0.
        optimizer: Local optimizer, new in every round: ``adamw`` or ``sgd``.
        proximal: FedProx's mu, >= 0: how hard local steps are pulled to the round's start (Li et
            al. 2020, arXiv 1812.06127). The pull follows clip and noise, and costs no privacy.
        scaffold: Steps are corrected by control variates, so that sites whose patients differ drift
            less apart in many local steps (SCAFFOLD, Karimireddy et al. 2020, arXiv 1910.06378).
            The correction follows clip and noise: it costs no privacy, and no byte more to send.
            With ``sgd``, and schemes ``fedavg`` and ``ffa``.
        deadline: Longest time a stage of a round may take: a number with s, m or h.
        participants: Each round asks so many sites of the roster, 3 to 5000, drawn by a public
            rule; left out, everybody. Noise and cost are those of a plan that asks everybody.
        physical_batch: Most records in one backward pass, 1 to 4096, and never fewer than
            ``records_per_unit``; a site may allow less. Decides memory, not the update.
    """

    count: int
    steps: int
    sampling_rate: float
    normaliser: float
    learning_rate: float
    spare: int = 2
    optimizer: Literal["adamw", "sgd"] = "adamw"
    proximal: float = 0.0
    scaffold: bool = field(default=False, metadata={typed_toml.LATER: True})
    deadline: str = "60m"
    physical_batch: int = 64
    participants: int | None = field(default=None, metadata={typed_toml.LATER: True})

    def __post_init__(self) -> None:
        """Check every limit."""
        require(1 <= self.count <= 100000, "count", self.count, "1 to 100000 rounds")
        require(0 <= self.spare <= 100000, "spare", self.spare, "0 to 100000 rounds")
        require(1 <= self.steps <= 10000, "steps", self.steps, "1 to 10000 steps")
        rate = self.sampling_rate
        require(0 < rate <= 1, "sampling_rate", rate, "a rate above 0 and at most 1")
        positive = 0 < self.normaliser < math.inf
        require(positive, "normaliser", self.normaliser, "a number above 0")
        positive = 0 < self.learning_rate < math.inf
        require(positive, "learning_rate", self.learning_rate, "a number above 0")
        require(0 <= self.proximal < math.inf, "proximal", self.proximal, "0 or more")
        shape = re.fullmatch(r"[1-9][0-9]{0,6}[smh]", self.deadline)
        require(shape is not None, "deadline", self.deadline, "a number with s, m or h, like '60m'")
        batch = self.physical_batch
        require(1 <= batch <= 4096, "physical_batch", batch, "1 to 4096 records")
        if self.participants is not None:
            asked = self.participants
            require(3 <= asked <= 5000, "participants", asked, "3 to 5000 sites, or left out")

    @property
    def deadline_seconds(self) -> int:
        """The deadline of one stage in seconds."""
        return int(self.deadline[:-1]) * _SECONDS[self.deadline[-1]]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """``[privacy]``: the guarantee to one unit, add/remove neighbours.

    Args:
        epsilon: > 0; ``inf`` switches privacy off and is refused outside simulation.
        delta: 0 < delta < 0.1; at most 1 / (10 x patients) is customary.
        clip: L2 bound of one unit's gradient, 1e-6 to 1e6.
        records_per_unit: At most so many records of one unit in a step, 1 to 1000.
    """

    epsilon: float = 8.0
    delta: float = 1e-6
    clip: float = 1.0
    records_per_unit: int = 4

    def __post_init__(self) -> None:
        """Check every limit."""
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0, or inf for no privacy")
        require(0 < self.delta < 0.1, "delta", self.delta, "above 0 and below 0.1")
        require(1e-6 <= self.clip <= 1e6, "clip", self.clip, "1e-6 to 1e6")
        records = self.records_per_unit
        require(1 <= records <= 1000, "records_per_unit", records, "1 to 1000")

    @property
    def enabled(self) -> bool:
        """Whether updates are clipped and noised at all."""
        return math.isfinite(self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """``[metrics]``: noised sums of held-out metrics beside the update; left out, none leaves.

    Args:
        epsilon: What all rounds' metrics together may cost one unit, > 0; charged on top.
        loss_bound: One unit's loss is clipped to 0 .. loss_bound, > 0.
    """

    epsilon: float
    loss_bound: float = 4.0

    def __post_init__(self) -> None:
        """Check every limit."""
        require(0 < self.epsilon < math.inf, "epsilon", self.epsilon, "a number above 0")
        positive = 0 < self.loss_bound < math.inf
        require(positive, "loss_bound", self.loss_bound, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole plan. Equal plans have equal hashes; a run freezes its plan when it starts.

    Args:
        name: Lower-case letters, digits and dashes.
        mode: ``local``: each site trains under its own noise, then updates are summed. ``pooled``:
            each round is one step over all sites together, whose noise they share.
        seed: Public seed of the adapter's start; no secret depends on it.
    """

    name: str
    model: Model
    rounds: Rounds
    mode: Literal["local", "pooled"] = "local"
    seed: int = 0
    tuner: Tuner = field(default_factory=Tuner)
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    cohort: Cohort = field(default_factory=Cohort)
    aggregation: Aggregation = field(default_factory=Aggregation)
    privacy: Privacy = field(default_factory=Privacy)
    metrics: Metrics | None = None
    fallback: Fallback | None = field(default=None, metadata={typed_toml.LATER: True})
    gate: Gate | None = field(default=None, metadata={typed_toml.LATER: True})

    def __post_init__(self) -> None:
        """Check every limit."""
        shape = re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.name)
        require(shape is not None, "name", self.name, "1 to 64 of a-z, 0-9 and '-'")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        self._check_combinations()
        if self.mode == "pooled":
            self._check_pooled()
        if self.cohort.groups > 1:
            self._check_groups()
        if self.rounds.scaffold:
            self._check_scaffold()

    def _check_combinations(self) -> None:
        """Refuse what a section allows on its own, but not beside the others."""
        data, minimum = self.data, self.cohort.minimum
        holds, needed = {
            "sft": (data.chosen is None, "'dpo' with chosen and rejected"),
            "classify": (
                data.messages is None and data.prompt is None,
                "'sft' with messages or prompt and completion: 'classify' reads text",
            ),
            "dpo": (data.chosen is not None, "[data] prompt, chosen and rejected for 'dpo'"),
            "kto": (data.completion is not None, "[data] prompt and completion for 'kto'"),
        }[self.task.objective]
        require(holds, "objective", self.task.objective, needed)
        if data.split is not None:
            allowed = f"at least [cohort] minimum = {minimum}"
            require(data.split.sites >= minimum, "sites", data.split.sites, allowed)
        self._check_participants()
        scheme, method = self.aggregation.scheme, self.tuner.method
        whole = not {"lora_A", "lora_B"} & {*self.tuner.personal}
        pairs = scheme == "fedavg" or (method in LORA and whole)
        allowed = f"'fedavg' with {method!r}, which is no product of A and B"
        if not whole:
            allowed = "'fedavg' where one of A and B is personal"
        require(pairs, "scheme", scheme, allowed)
        alike = self.tuner.ranks is None or scheme == "sketch"
        # A and B of other ranks have no mean, but their products do.
        require(alike, "ranks", self.tuner.ranks, f"none with {scheme!r}: only 'sketch' mixes them")
        wide = self.metrics is None or self.aggregation.word_bits == 32
        require(wide, "word_bits", self.aggregation.word_bits, "32 beside [metrics]")
        if self.aggregation.weights is not None:
            # Otherwise a sum of the fewest sites, less the colluders' part, is nearly one update.
            unknown = minimum - 1 - self.cohort.colluders
            *lighter, heaviest = sorted(self.aggregation.weights.values()) or [math.inf]
            allowed = f"none above the {unknown} lightest others together"
            holds = heaviest <= math.fsum(lighter[:unknown])
            require(holds, "weights", dict(self.aggregation.weights), allowed)

    def _check_participants(self) -> None:
        """Refuse a round that asks fewer sites than a sum, or each group's, needs."""
        asked, cohort, split = self.rounds.participants, self.cohort, self.data.split
        if asked is None:
            return
        allowed = f"at least [cohort] minimum = {cohort.minimum}"
        if cohort.groups > 1:
            allowed += f" for each of {cohort.groups} groups"
        require(asked >= cohort.minimum * cohort.groups, "participants", asked, allowed)
        if split is not None:
            allowed = f"at most [data] split.sites = {split.sites}"
            require(asked <= split.sites, "participants", asked, allowed)

    def _check_groups(self) -> None:
        """Refuse what a median over groups has no meaning for."""
        scheme, groups = self.aggregation.scheme, self.cohort.groups
        linear = scheme in {"fedavg", "ffa", "alternating"}
        require(self.mode == "local", "groups", groups, "1 in mode 'pooled'")
        require(linear, "groups", groups, f"1 with {scheme!r}: its sums are no parameters")
        require(self.aggregation.weights is None, "groups", groups, "1 beside weights")

    def _check_scaffold(self) -> None:
        """Refuse what control variates have no meaning for, or would be wrong beside."""
        rounds, scheme, method = self.rounds, self.aggregation.scheme, self.tuner.method
        length, groups = rounds.steps * rounds.learning_rate, self.cohort.groups
        share = self.aggregation.coordinates
        for holds, key, value, allowed in (
            (self.mode == "local", "mode", self.mode, "'local'"),
            # An update is a sum of gradients under plain steps alone.
            (rounds.optimizer == "sgd", "optimizer", rounds.optimizer, "'sgd'"),
            (method != "lora+", "method", method, "another than 'lora+', which has two rates"),
            (rounds.proximal == 0, "proximal", rounds.proximal, "0"),
            # The sum of all control variates is known from the mean of all updates alone.
            (scheme in {"fedavg", "ffa"}, "scheme", scheme, "'fedavg' or 'ffa'"),
            (share == 1, "coordinates", share, "1"),
            (groups == 1, "groups", groups, "1, because a median is no mean"),
            # An adapter of the coordinator's own training has none.
            (self.fallback is None, "fallback", self.fallback, "none"),
            (not self.tuner.personal, "personal", list(self.tuner.personal), "none"),
            # Far from where float32 ends.
            (1e-9 <= length <= 1e9, "steps * learning_rate", length, "1e-9 to 1e9"),
        ):
            require(holds, key, value, f"{allowed} beside scaffold")

    def after_fallback(self, adapter: str) -> "Plan":
        """The plan as sites approve it once the coordinator's own training made an adapter.

        Raises:
            ConfigurationError: The plan has no ``[fallback]``.
        """
        if self.fallback is None:
            raise ConfigurationError("the plan has no [fallback]")
        return dataclasses.replace(
            self, fallback=dataclasses.replace(self.fallback, adapter=adapter)
        )

    def _check_pooled(self) -> None:
        """Refuse what a step over all sites together has no meaning for."""
        rounds, aggregation = self.rounds, self.aggregation
        scheme, ratio = aggregation.scheme, rounds.learning_rate / rounds.normaliser
        for holds, key, value, allowed in (
            (rounds.steps == 1, "steps", rounds.steps, "1"),
            (rounds.optimizer == "sgd", "optimizer", rounds.optimizer, "'sgd'"),
            (rounds.proximal == 0, "proximal", rounds.proximal, "0"),
            # Far from where float32 ends, with any clip and any number of units.
            (1e-9 <= ratio <= 1e9, "learning_rate / normaliser", ratio, "1e-9 to 1e9"),
            # Whoever has added a share of the noise can take it away again.
            # What moved without noise would carry a patient into the others' next gradients.
            (not self.tuner.personal, "personal", list(self.tuner.personal), "none"),
            # The step is taken on the sum, at one rate for all.
            (self.tuner.method != "lora+", "method", self.tuner.method, "another than 'lora+'"),
            (self.cohort.colluders >= 1, "colluders", self.cohort.colluders, "1 or more"),
            (scheme in {"fedavg", "ffa"}, "scheme", scheme, "'fedavg' or 'ffa'"),
            (aggregation.word_bits == 32, "word_bits", aggregation.word_bits, "32"),
            (aggregation.weights is None, "weights", aggregation.weights, "none"),
            # What bounds a unit in a rounded, noised step is shown for whole gradients alone.
            (aggregation.coordinates == 1, "coordinates", aggregation.coordinates, "1"),
        ):
            require(holds, key, value, f"{allowed} in mode 'pooled'")

    def hash(self) -> bytes:
        """The 32 bytes that approve, sign and bind this plan."""
        return digest("plan", self.to_json())

    def to_json(self) -> bytes:
        """Canonical JSON with every default written out; :func:`from_json` reads it back."""
        return canonical_json(_as_json(self))


def _as_json(section: Any) -> dict[str, Json]:  # noqa: ANN401  # any dataclass of this module
    """Every key and value of a section; a float key always holds a float, so that 8 is 8.0."""
    values: dict[str, Json] = {}
    for item in dataclasses.fields(section):
        value = vars(section)[item.name]
        if item.metadata.get(typed_toml.LATER) and value == item.default:
            continue
        if dataclasses.is_dataclass(value):
            values[item.name] = _as_json(value)
        else:
            values[item.name] = float(value) if item.type is float else value
    return values


def load_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        ConfigurationError: Names file, section, key, value and what is allowed.
    """
    return typed_toml.load(Plan, path)


def from_json(data: bytes) -> Plan:
    """Read exactly what :meth:`Plan.to_json` wrote, with the same checks as a file.

    Raises:
        ConfigurationError: Not JSON, not a valid plan, or another spelling of one.
    """
    plan = typed_toml.parse_json(Plan, data)
    if plan.to_json() != data:
        raise ConfigurationError("a valid plan, but not spelled as Fedward writes it")
    return plan
