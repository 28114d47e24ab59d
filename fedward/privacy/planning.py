"""Answers before a run: what noise for this epsilon, what epsilon for this noise, what is left.

The same functions that site and coordinator rely on give every answer; where dp-accounting is
installed, a second accountant (Google's PLD) says what it thinks of it.
"""

import functools
import importlib.util
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedward.errors import ConfigurationError, InvalidValue
from fedward.identity import Identity
from fedward.plan import Plan
from fedward.privacy.accounting import SampledGaussian, epsilon, noise_multiplier, renyi_epsilon
from fedward.privacy.books import Books
from fedward.privacy.ledger import read_books
from fedward.privacy.planned import metric_event

LEAST_DRAW = 8.0
"""Units drawn a step below which the noise drowns what a site can learn (DESIGN §7)."""

_GRID = 1e-3  # PLD's grid for each record: the fourth digit of epsilon


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a run would do, as far as privacy is concerned.

    Args:
        delta: 0 < delta < 1.
        sampling_rate: Poisson rate of every unit, 0 < rate <= 1.
        steps: Local steps a round, 1 or more.
        rounds: Rounds that must complete, 1 or more.
        spare: Lost rounds that may be repeated, 0 or more; they are paid for in advance.
        epsilon: What all rounds together may cost, > 0 and finite; None asks for it.
        sigma: The noise multiplier, > 0; None asks for the smallest that keeps to epsilon.
        metrics: What the metrics of one round cost beside it.
        unit: Whom privacy protects.
    """

    delta: float
    sampling_rate: float
    steps: int
    rounds: int
    spare: int = 2
    epsilon: float | None = None
    sigma: float | None = None
    metrics: SampledGaussian | None = None
    unit: str = "patient"

    def __post_init__(self) -> None:
        """Check every limit that the events do not check."""
        for key, value, low in (
            ("steps", self.steps, 1),
            ("rounds", self.rounds, 1),
            ("spare", self.spare, 0),
        ):
            if value < low:
                raise InvalidValue(key, value, f"{low} or more")
        for key, number in (("epsilon", self.epsilon), ("sigma", self.sigma)):
            if number is not None and not 0 < number < math.inf:
                raise InvalidValue(key, number, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class RunLeft:
    """What a ledger says of one run: reservations (one a round) sent, and still to be had."""

    run: str
    spent: int
    left: int
    closed: bool


@dataclass(frozen=True, kw_only=True)
class AtSite:
    """What a site's ledger has and what it would still admit.

    Args:
        cap: Lifetime epsilon.
        delta: Lifetime delta.
        spent: Epsilon of what has left.
        committed: Epsilon of that and of what open runs may still send.
        alone: Epsilon of what has left if all other sites' noise were known.
        rounds_left: The most rounds of the asked kind, spares counted, that a new run would get.
        runs: Each run of the ledger, oldest first.
    """

    cap: float
    delta: float
    spent: float
    committed: float
    alone: float
    rounds_left: int
    runs: tuple[RunLeft, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that was asked, and what comes out.

    Args:
        question: What was asked.
        neighbours: Which two data sets count as neighbours, in words.
        noise_multiplier: Deviation of the noise over the clip.
        epsilon: What all rounds, spares and metrics cost together (PRV).
        epsilon_pld: The same by dp-accounting's PLD; None where it is not installed.
        epsilon_renyi: The same by the filter that judges every run after a site's first.
        units: Units at a site, as given.
        expected_draw: Units that a step draws on average there.
        records: Records of one patient, as given.
        epsilon_records: What a patient with so many records pays if each were its own unit.
        site: What the site's ledger says, where one was given.
        warnings: What deserves a second look, in sentences.
    """

    question: Question
    neighbours: str
    noise_multiplier: float
    epsilon: float
    epsilon_pld: float | None
    epsilon_renyi: float
    units: int | None = None
    expected_draw: float | None = None
    records: int | None = None
    epsilon_records: float | None = None
    site: AtSite | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values under the names above; an infinite epsilon is null."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @property
    def events(self) -> tuple[SampledGaussian, ...]:
        """What one round costs."""
        return events_of(self.question, self.noise_multiplier)


def ask(plan: Plan | None, given: Mapping[str, Any]) -> Question:
    """The question of a plan, of single values, or of a plan with some values replaced.

    Raises:
        InvalidValue: A value is missing or out of range, or the plan has no privacy.
    """
    values: dict[str, Any] = {}
    if plan is not None:
        if not plan.privacy.enabled and not given.keys() & {"epsilon", "sigma"}:
            raise InvalidValue("epsilon", plan.privacy.epsilon, "a finite epsilon to account for")
        values = {
            "epsilon": plan.privacy.epsilon if plan.privacy.enabled else None,
            "delta": plan.privacy.delta,
            "sampling_rate": plan.rounds.sampling_rate,
            "steps": plan.rounds.steps,
            "rounds": plan.rounds.count,
            "spare": plan.rounds.spare,
            "metrics": metric_event(plan) if plan.privacy.enabled else None,
            "unit": plan.data.unit or "record",
        }
    values |= given
    needed = {"delta": "delta", "sampling_rate": "rate", "steps": "steps", "rounds": "rounds"}
    missing = [f"--{option}" for key, option in needed.items() if key not in values]
    if missing:
        raise ConfigurationError(
            f"expected a plan, or every value of one; {', '.join(missing)} are missing"
        )
    return Question(**values)


def books_at(
    site: Path | None,
    ledger: Path | None,
    key: Path | None,
    *,
    cap: float | None,
    question: Question,
) -> Books | None:
    """The books that the options name, read without holding them; None where none is named.

    Raises:
        ConfigurationError: The options do not fit together, or the site's policy is unreadable.
        LedgerError: The ledger is not what the site wrote.
    """
    if site is not None and ledger is None:
        return site_books(site)
    if ledger is None:
        return None
    cap = question.epsilon if cap is None else cap
    if site is not None or key is None or cap is None:
        raise ConfigurationError("expected --site alone, or --ledger with --key and a --cap")
    public_key = Identity.load(key).public_key
    return read_books(ledger, public_key, epsilon=cap, delta=question.delta)


def answer(
    question: Question,
    *,
    units: int | None = None,
    records: int | None = None,
    books: Books | None = None,
) -> Answer:
    """Answer a question.

    Args:
        question: What a run would do.
        units: Units at a site, 1 or more, for the expected draw.
        records: Records of one patient, 1 or more, for the cost of record-level privacy.
        books: A site's ledger.

    Raises:
        InvalidValue: A value is out of range, or no noise reaches the epsilon.
        ConfigurationError: ``records`` without dp-accounting.
    """
    for key, value in (("units", units), ("records", records)):
        if value is not None and value < 1:
            raise InvalidValue(key, value, "1 or more")
    sigma = _sigma(question)
    costs = [event.times(question.rounds + question.spare) for event in events_of(question, sigma)]
    whole = epsilon(costs, question.delta)
    draw = None if units is None else question.sampling_rate * units
    return Answer(
        question=question,
        neighbours=f"one {question.unit}, with all its records, added or removed",
        noise_multiplier=sigma,
        epsilon=whole,
        epsilon_pld=pld_epsilon(costs, question.delta) if _has_pld() else None,
        epsilon_renyi=renyi_epsilon(costs, question.delta),
        units=units,
        expected_draw=draw,
        records=records,
        epsilon_records=None if records is None else record_epsilon(costs, records, question.delta),
        site=None if books is None else _at_site(books, events_of(question, sigma)),
        warnings=tuple(_warnings(question, draw)),
    )


def events_of(question: Question, sigma: float) -> tuple[SampledGaussian, ...]:
    """What one round of a question costs with this noise."""
    training = SampledGaussian(
        noise_multiplier=sigma, sampling_rate=question.sampling_rate, steps=question.steps
    )
    return (training,) if question.metrics is None else (training, question.metrics)


def _sigma(question: Question) -> float:
    if question.sigma is not None:
        return question.sigma
    if question.epsilon is None:
        raise ConfigurationError("expected a target (--epsilon) or the noise (--sigma)")
    return noise_multiplier(
        epsilon=question.epsilon,
        delta=question.delta,
        sampling_rate=question.sampling_rate,
        steps=(question.rounds + question.spare) * question.steps,
    )


def _warnings(question: Question, draw: float | None) -> list[str]:
    found = list[str]()
    if draw is not None and draw < LEAST_DRAW:
        found.append(
            f"a step draws {draw:.3g} units on average, below {LEAST_DRAW:g}: this site adds "
            "little but noise; raise the sampling rate, or leave it out"
        )
    if question.unit == "record":
        found.append(
            "each record is a unit of its own: a patient with several is protected less "
            "(--records K tells how much); name the patient's column with [data] unit"
        )
    return found


def _at_site(books: Books, events: Sequence[SampledGaussian]) -> AtSite:
    cap, delta = books.cap
    return AtSite(
        cap=cap,
        delta=delta,
        spent=books.epsilon_spent(),
        committed=books.epsilon_committed(),
        alone=books.epsilon_alone(),
        rounds_left=books.room(events),
        runs=tuple(
            RunLeft(
                run=run,
                spent=books.spent(run),
                left=books.remaining(run),
                closed=books.closed(run),
            )
            for run in books.runs
        ),
    )


def site_books(folder: Path) -> Books:
    """The books of a site's folder under the caps of its policy; empty before its first run.

    Raises:
        ConfigurationError: No policy there, or one without caps.
        LedgerError: The ledger is not what the site wrote.
    """
    policy = folder / "policy.toml"
    try:
        limits = tomllib.loads(policy.read_text("utf-8"))
        cap, delta = float(limits["max_epsilon"]), float(limits["delta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{policy}: expected a policy with max_epsilon and delta: {error}"
        ) from error
    ledger = folder / "ledger.jsonl"
    if not ledger.exists():
        return Books(epsilon=cap, delta=delta)
    public_key = Identity.load(folder / "key").public_key
    return read_books(ledger, public_key, epsilon=cap, delta=delta)


def pld_epsilon(costs: Sequence[SampledGaussian], delta: float) -> float:
    """The epsilon of events by dp-accounting's privacy loss distributions (add or remove one).

    Raises:
        ConfigurationError: dp-accounting is not installed.
    """
    return record_epsilon(costs, 1, delta)


def record_epsilon(costs: Sequence[SampledGaussian], records: int, delta: float) -> float:
    """What a patient pays whose records are drawn, clipped and counted one by one.

    How many of k records a step draws is binomial, and each moves the sum by up to one clip: a
    mixture of Gaussians. Its loss distribution is rounded up to a grid that grows with k.

    Args:
        costs: What is released, each record taken as a unit.
        records: The patient's records ``k``, 1 or more.
        delta: 0 < delta < 1.

    Raises:
        ConfigurationError: dp-accounting is not installed.
    """
    if not _has_pld():
        raise ConfigurationError(
            "the cost for several records needs dp-accounting: pip install 'fedward[accounting]'"
        )
    from dp_accounting.pld import privacy_loss_distribution as pld

    parts = []
    for cost in costs:
        rate = cost.sampling_rate
        chances = [
            math.comb(records, j) * rate**j * (1 - rate) ** (records - j)
            for j in range(records + 1)
        ]
        drawn = [j for j, chance in enumerate(chances) if chance > 0]  # at rate 1 all or nothing
        step = pld.from_mixture_gaussian_mechanism(
            cost.noise_multiplier,
            drawn,
            [chances[j] for j in drawn],
            value_discretization_interval=_GRID * records,
        )
        parts.append(step.self_compose(cost.steps))
    whole = functools.reduce(lambda one, other: one.compose(other), parts)
    return float(whole.get_epsilon_for_delta(delta))


def _has_pld() -> bool:
    return importlib.util.find_spec("dp_accounting") is not None


def _plain(value: object) -> object:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def curves(found: Answer, *, points: int = 16) -> tuple[list[tuple[float, float]], ...]:
    """Two curves for a plot: (rounds, epsilon) up to the last spare, and (sigma, epsilon).

    Args:
        found: An answer.
        points: About how many points each has, 2 or more.
    """
    question, events = found.question, found.events
    total = question.rounds + question.spare
    rounds = sorted({max(1, round(total * i / points)) for i in range(1, points + 1)})
    over_rounds = [
        (float(n), epsilon([event.times(n) for event in events], question.delta)) for n in rounds
    ]
    sigmas = [found.noise_multiplier * 4 ** (i / (points - 1) - 0.5) for i in range(points)]
    over_sigma = list[tuple[float, float]]()
    for sigma in sigmas:
        costs = [replace(events[0], noise_multiplier=sigma), *events[1:]]
        over_sigma.append((sigma, epsilon([cost.times(total) for cost in costs], question.delta)))
    return over_rounds, over_sigma
