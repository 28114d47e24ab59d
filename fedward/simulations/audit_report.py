"""What an audit found: findings in words, ``audit.json``, ``audit.html`` and a terminal's table."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from fedward import __version__
from fedward.plan import Plan
from fedward.privacy.audit_bound import ReleaseBound
from fedward.privacy.audit_canaries import CHANCE_EXPOSURE, CanaryBound
from fedward.privacy.audit_sensitivity import Sensitivity
from fedward.private_files import write_private
from fedward.simulations.attacks import Attacks
from fedward.simulations.charts import line_chart
from fedward.simulations.report import page, plain, table


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Args:
        name: What was tried.
        claimed: What the accountant claims, or what luck would give.
        found: What was found.
        holds: Whether it is compatible with the claim; attacks have no claim and always hold.
        meaning: One sentence for a data protection officer.
    """

    name: str
    claimed: str
    found: str
    holds: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The facts of one audit.

    Args:
        plan: As audited.
        subject: What was trained with canaries.
        confidence: Of each bound by itself.
        rounds: Rounds of the canary run.
        searches: Layer A.
        releases: Layer B.
        canaries: Layer C.
        canaries_without_noise: The same attack where it must succeed.
        attacks: Membership inference and gradient inversion, if they were asked for.
        seconds: Wall-clock time.
    """

    plan: Plan
    subject: str
    confidence: float
    rounds: int
    searches: tuple[Sensitivity, ...]
    releases: tuple[ReleaseBound, ...]
    canaries: CanaryBound
    canaries_without_noise: CanaryBound
    attacks: Attacks | None
    seconds: float

    def findings(self) -> list[Finding]:
        """Every finding in the order of the report."""
        found = [_sensitivity(self.searches), *map(_release, self.releases)]
        found += _canaries(self.canaries, self.canaries_without_noise)
        return found + (list(_attacks(self.attacks)) if self.attacks else [])

    def to_json(self) -> dict[str, Any]:
        """The document of ``audit.json``; infinities are the text ``inf``."""
        document = {
            "claimed_epsilon": self.canaries.claim,
            "empirical_lower_bound": self.canaries.lower,
            "canary_exposure": self.canaries.exposure,
            "holds": all(finding.holds for finding in self.findings()),
            "audited": self.subject,
            "rounds": self.rounds,
            "confidence": self.confidence,
            "delta": self.plan.privacy.delta,
            "sensitivity": [
                {"clips": one.clips, "pair": one.pair.name, "pairs": one.tried}
                for one in self.searches
            ],
            "releases": [dataclasses.asdict(one) for one in self.releases],
            "canaries": dataclasses.asdict(self.canaries),
            "canaries_without_noise": dataclasses.asdict(self.canaries_without_noise),
            "attacks": self.attacks and dataclasses.asdict(self.attacks),
            "findings": [dataclasses.asdict(finding) for finding in self.findings()],
            "plan": self.plan.name,
            "plan_hash": self.plan.hash().hex(),
            "seconds": round(self.seconds, 3),
            "version": __version__,
        }
        result: dict[str, Any] = plain(document)
        return result


def _sensitivity(searches: tuple[Sensitivity, ...]) -> Finding:
    worst, tried = max(one.clips for one in searches), sum(one.tried for one in searches)
    return Finding(
        name="A: one unit's influence before noise, in clips",
        claimed="at most 1",
        found=f"{worst:.4f}",
        holds=all(one.holds for one in searches),
        meaning=f"In {tried} pairs of data sets that differ in one unit, it changed the sum by at "
        f"most {worst:.4f} times what the noise is made for.",
    )


def _release(bound: ReleaseBound) -> Finding:
    drawn = "everybody drawn" if bound.sampling_rate == 1 else f"rate {bound.sampling_rate:g}"
    others = f"{bound.others} others" if bound.others else "alone"
    again = f" Noise came again {bound.repeated} times." if bound.repeated else ""
    return Finding(
        name=f"B: epsilon of one step, {drawn}, {others}",
        claimed=f"at most {bound.claim:.2f}",
        found=_at_least(bound),
        holds=bound.holds,
        meaning=f"An attacker who knows everything but one unit, and sees {bound.releases} steps "
        f"with and without it, proves no more than this of the epsilon that is claimed.{again}",
    )


def _at_least(bound: ReleaseBound | CanaryBound) -> str:
    """The bound, and where luck put it above the claim the surer one, which decides."""
    surely = f", surely {bound.surely:.2f}" if bound.lower > bound.claim else ""
    return f"at least {bound.lower:.2f}{surely}"


def _canaries(seen: CanaryBound, control: CanaryBound) -> list[Finding]:
    return [
        Finding(
            name="C: epsilon of the whole training",
            claimed=f"at most {seen.claim:.2f}",
            found=_at_least(seen),
            holds=seen.holds,
            meaning=f"Somebody who watches every step guessed {seen.right} of {seen.guesses} "
            f"planted records right; without noise the same attack guesses {control.right} of "
            f"{control.guesses} and proves {control.lower:.2f}.",
        ),
        Finding(
            name="C: exposure of planted records, in bits",
            claimed=f"luck {CHANCE_EXPOSURE:.2f}",
            found=f"{seen.exposure:.2f}",
            holds=True,
            meaning=f"So far the run narrows the search for a planted record, of "
            f"{seen.most_exposure:.1f} bits at most; without noise {control.exposure:.2f}.",
        ),
    ]


def _attacks(attacks: Attacks) -> Iterator[Finding]:
    ours, naked = attacks.membership, attacks.membership_without
    yield Finding(
        name="membership inference (AUC)",
        claimed="luck 0.50",
        found=f"{ours.auc:.2f} ± {ours.deviation:.2f}",
        holds=True,
        meaning="Chance that a patient whose notes were trained on looks more like it than another "
        f"patient does; without privacy {naked.auc:.2f} ± {naked.deviation:.2f}.",
    )
    read, bare = attacks.inversion, attacks.inversion_without
    yield Finding(
        name="words read out of one patient's update",
        claimed=f"luck {read.chance:.0%}",
        found=f"{read.found:.0%}",
        holds=True,
        meaning="Share of the different words of a patient's notes that the update gives away; "
        f"without privacy {bare.found:.0%}.",
    )


def render_table(report: AuditReport) -> Table:
    """The findings as a table for the terminal."""
    found = Table(title="Privacy audit", title_justify="left", caption=_scope(report))
    found.add_column("tried")
    found.add_column("claimed", justify="right")
    found.add_column("found", justify="right")
    found.add_column("")
    for one in report.findings():
        verdict = "[green]holds[/green]" if one.holds else "[bold red]REFUTED[/bold red]"
        found.add_row(one.name, one.claimed, one.found, verdict)
    return found


def write_audit(folder: Path, report: AuditReport) -> dict[str, Any]:
    """Write ``audit.json`` and ``audit.html``, each replaced as a whole; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    document = report.to_json()
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_private(folder / "audit.json", text.encode())
    write_private(folder / "audit.html", render_page(report).encode())
    return document


def _scope(report: AuditReport) -> str:
    return (
        f"Layer C: {report.canaries.canaries} canaries and {report.subject}, {report.rounds} of "
        f"{report.plan.rounds.count} rounds. Each bound holds with probability "
        f"{report.confidence:g} by itself; none proves that privacy is kept."
    )


def render_page(report: AuditReport) -> str:
    """The findings as one self-contained page."""
    rows = ["<tr><th>tried</th><th>claimed</th><th>found</th><th></th></tr>"]
    for one in report.findings():
        verdict = "holds" if one.holds else "<strong>REFUTED</strong>"
        rows.append(
            f'<tr><th scope="row">{escape(one.name)}</th><td>{escape(one.claimed)}</td>'
            f'<td class="number">{escape(one.found)}</td><td>{verdict}</td></tr>'
            f'<tr><td colspan="4"><p>{escape(one.meaning)}</p></td></tr>'
        )
    title = "Canaries found at each share of false alarms"
    chart = line_chart(_curves(report), title=title, x="false alarms, %", y="found")
    return page(
        report.plan.name,
        f"<h1>Privacy audit of {escape(report.plan.name)}</h1><p>{escape(_scope(report))}</p>"
        f"{table(rows)}<h2>Who is found</h2>{chart}"
        f"<p>Plan SHA-256 {report.plan.hash().hex()}</p>",
    )


def _curves(report: AuditReport) -> dict[str, tuple[float, ...]]:
    curves = {
        "canaries": report.canaries.roc,
        "canaries, no noise": report.canaries_without_noise.roc,
    }
    if report.attacks is not None:
        curves["members"] = report.attacks.membership.roc
        curves["members, no privacy"] = report.attacks.membership_without.roc
    return curves | {"luck": tuple(percent / 100 for percent in range(101))}
