"""What a simulation found: ``report.json``, ``report.html`` and the table on the terminal."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from fedward import __version__
from fedward.plan import Plan
from fedward.private_files import write_private
from fedward.simulations.charts import line_chart


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracy (``classify``) or mean loss per example (``sft``) on the held-out records.

    Args:
        base: The base model as it came.
        federated: The federation's adapter.
        alone: Site name to what it reaches with its own records only, under the same privacy.
        central: Pooled records with the same rate, sigma and steps; None was not run.
        central_without_privacy: Pooled records without clipping and noise; None was not run.
        classical: TF-IDF with logistic regression on pooled records; None was not run.
    """

    base: float
    federated: float
    alone: Mapping[str, float] = field(default_factory=dict)
    central: float | None = None
    central_without_privacy: float | None = None
    classical: float | None = None

    def rows(self) -> list[tuple[str, float]]:
        """Every score that there is, by a name for readers, in the order of a table."""
        rows = [("base model", self.base)]
        rows += [(f"{name} alone", score) for name, score in self.alone.items()]
        if self.alone:
            rows.append(("mean of sites alone", sum(self.alone.values()) / len(self.alone)))
        optional = {
            "federated": self.federated,
            "central on pooled data": self.central,
            "central, no privacy": self.central_without_privacy,
            "TF-IDF, no privacy": self.classical,
        }
        return rows + [(name, score) for name, score in optional.items() if score is not None]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the coordinator received in one session: one site's masked input, and the sum.

    Args:
        site: Whose input.
        masked: Its first bytes; they are indistinguishable from random ones.
        total: The first coordinates of the decoded sum over the cohort.
    """

    site: str
    masked: bytes
    total: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The facts of one simulation.

    Args:
        plan: The frozen plan.
        scores: Held-out scores of every way of training.
        epsilon: Site name to what its patients' budget was charged in all, at the plan's delta.
        bytes_up: Site name to bytes that it sent, repeated attempts included; what it had sent in a
            round that a kill interrupted is not counted.
        rounds: Completed rounds.
        seconds: Wall-clock time of everything.
        curves: Way of training to its score before the first and after every round.
        cohorts: For every completed round the sites in its sum.
        seen: What the coordinator saw; None when nothing was watched.
    """

    plan: Plan
    scores: Scores
    epsilon: Mapping[str, float]
    bytes_up: Mapping[str, int]
    rounds: int
    seconds: float
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    cohorts: Sequence[Sequence[str]] = ()
    seen: Seen | None = None

    @property
    def measure(self) -> str:
        """``accuracy`` of classes and preferences, or ``loss`` for plans that write text."""
        return "loss" if self.plan.task.objective == "sft" else "accuracy"

    def to_json(self) -> dict[str, Any]:
        """The document of ``report.json``; numbers that JSON lacks become ``inf`` and null."""
        scores = dataclasses.asdict(self.scores)
        without_privacy = scores.pop("central_without_privacy")
        document = {
            self.measure: scores,
            "without_privacy": {"central": without_privacy},
            "epsilon": dict(self.epsilon),
            "bytes_up": dict(self.bytes_up),
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "curves": self.curves,
            "cohorts": self.cohorts,
            "coordinator_saw": self.seen
            and {
                "site": self.seen.site,
                "masked": self.seen.masked.hex(),
                "sum": self.seen.total,
            },
            "plan": dataclasses.asdict(self.plan),
            "plan_hash": self.plan.hash().hex(),
            "version": __version__,
        }
        result: dict[str, Any] = plain(document)
        return result


def write_report(folder: Path, facts: Report) -> None:
    """Write ``report.json`` and ``report.html``, each replaced as a whole.

    Args:
        folder: Made if it is missing.
        facts: What to report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(facts.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_private(folder / "report.json", document.encode())
    write_private(folder / "report.html", render_page(facts).encode())


def render_table(facts: Report) -> Table:
    """The scores as a table for the terminal, best way of training in bold."""
    rows = facts.scores.rows()
    best = max if facts.measure == "accuracy" else min
    winner = best(rows, key=lambda row: row[1])[0]
    table = Table(title=f"Held-out {facts.measure}", title_justify="left")
    table.add_column("trained")
    table.add_column(facts.measure, justify="right")
    for name, score in rows:
        table.add_row(name, f"{score:.3f}", style="bold" if name == winner else "")
    return table


def render_sites(facts: Report) -> Table:
    """What each site spent and sent, as a table for the terminal."""
    table = Table(title="Sites", title_justify="left")
    table.add_column("site")
    for heading in ("epsilon spent", "bytes up", "rounds in a sum"):
        table.add_column(heading, justify="right")
    for site, epsilon in facts.epsilon.items():
        rounds = sum(site in cohort for cohort in facts.cohorts)
        table.add_row(site, f"{epsilon:.2f}", f"{facts.bytes_up.get(site, 0):,}", str(rounds))
    return table


def render_seen(seen: Seen) -> str:
    """What the coordinator saw, as two lines for the terminal."""
    numbers = " ".join(f"{value:+.4f}" for value in seen.total[:4])
    return (
        f"the coordinator saw of {seen.site}: {seen.masked[:24].hex(' ', 4)} ...\n"
        f"and of the sum over the cohort: {numbers} ..."
    )


def render_page(facts: Report) -> str:
    """The facts as one self-contained page: no script and nothing loaded from elsewhere."""
    name = escape(facts.plan.name)
    sections = [
        f"<h1>{name}</h1><p>{_summary(facts)}</p>",
        f"<h2>Held-out {facts.measure}</h2>{_score_table(facts)}",
        _curves(facts),
        f"<h2>Sites</h2>{_site_table(facts)}",
        _seen(facts.seen),
        f"<h2>Plan</h2><p>SHA-256 {facts.plan.hash().hex()}</p>{_plan_table(facts.plan)}",
    ]
    return page(facts.plan.name, "".join(sections))


def page(title: str, body: str) -> str:
    """A self-contained page around the HTML of its body."""
    style = resources.files("fedward.simulations").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Fedward</title><style>{style}</style></head>"
        f"<body><main>{body}</main>"
        f"<footer>Fedward {__version__}</footer></body></html>\n"
    )


def _summary(facts: Report) -> str:
    privacy, sites = facts.plan.privacy, len(facts.epsilon)
    spent = max(facts.epsilon.values(), default=0.0)
    unit = escape(facts.plan.data.unit or "record")
    promise = (
        f"At most epsilon {spent:.2f} of {privacy.epsilon:g} was spent per {unit} "
        f"(delta {privacy.delta:g})."
        if privacy.enabled
        else "Privacy was switched off."
    )
    return f"{sites} sites, {facts.rounds} rounds, {facts.seconds:.0f} seconds. {promise}"


def _score_table(facts: Report) -> str:
    rows = facts.scores.rows()
    full = 1.0 if facts.measure == "accuracy" else max(score for _, score in rows) or 1.0
    body = [
        f'<tr{" class=own" if name == "federated" else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="number">{score:.3f}</td><td class="wide"><div class="bar" '
        f'style="width:{min(100.0, max(0.0, 100 * score / full)):.1f}%"></div></td></tr>'
        for name, score in rows
    ]
    better = "higher" if facts.measure == "accuracy" else "lower"
    return f"<p>Same records, never trained on; {better} is better.</p>{table(body)}"


def _curves(facts: Report) -> str:
    curves = {
        name: values
        for name, values in facts.curves.items()
        if values and all(math.isfinite(value) for value in values)
    }
    if not curves:
        return ""
    title = f"Held-out {facts.measure} after every round"
    return f"<h2>Round by round</h2>{line_chart(curves, title=title, x='round', y=facts.measure)}"


def _site_table(facts: Report) -> str:
    head = "<tr><th>site</th><th>epsilon spent</th><th>bytes up</th><th>rounds in a sum</th></tr>"
    body = [
        f'<tr><th scope="row">{escape(site)}</th><td class="number">{epsilon:.2f}</td>'
        f'<td class="number">{facts.bytes_up.get(site, 0):,}</td>'
        f'<td class="number">{sum(site in cohort for cohort in facts.cohorts)}</td></tr>'
        for site, epsilon in facts.epsilon.items()
    ]
    missed = [
        f"Round {number}: without {escape(', '.join(gone))}."
        for number, cohort in enumerate(facts.cohorts, 1)
        if (gone := [site for site in facts.epsilon if site not in cohort])
    ]
    counted = "Bytes up leave out what a site had sent in a round that a kill interrupted."
    return table([head, *body]) + "".join(f"<p>{line}</p>" for line in [*missed, counted])


def _seen(seen: Seen | None) -> str:
    if seen is None:
        return ""
    numbers = ", ".join(f"{value:+.5f}" for value in seen.total)
    return (
        "<h2>What the coordinator saw</h2>"
        f"<p>The masked update of {escape(seen.site)}, first bytes:</p>"
        f"<pre>{seen.masked.hex(' ', 4)}</pre>"
        f"<p>The sum over the cohort, first numbers:</p><pre>{numbers}</pre>"
    )


def _plan_table(plan: Plan) -> str:
    rows = []
    for key, value in plain(dataclasses.asdict(plan)).items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [
            f'<tr><th scope="row">{escape(f"{key}.{inner}" if inner else key)}</th>'
            f"<td>{escape(json.dumps(entry, ensure_ascii=False))}</td></tr>"
            for inner, entry in entries
        ]
    return table(rows)


def table(rows: Sequence[str]) -> str:
    """A table of rows that are HTML already, scrolled where it is too wide."""
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def plain(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    """The value with plain containers; infinities as ``inf``, which TOML reads, and NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
