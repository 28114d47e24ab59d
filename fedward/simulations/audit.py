"""``fedward privacy audit``: every layer of the audit through the engine that a site uses."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedward.client.trainer import mechanism
from fedward.errors import InvalidValue, PrivacyError
from fedward.plan import Plan, load_plan
from fedward.privacy.audit_bound import ReleaseBound, attack_releases
from fedward.privacy.audit_canaries import CanaryBound
from fedward.privacy.audit_sensitivity import Sensitivity, micro_pairs, search
from fedward.privacy.noise import SecureStream
from fedward.simulations.attacks import Attacks, attack
from fedward.simulations.audit_report import AuditReport, render_table, write_audit
from fedward.simulations.audit_rig import real_rig, rig_pairs, shake, tiny_rig
from fedward.simulations.audit_training import audit_training
from fedward.simulations.demo import prepare_demo
from fedward.tuning.records import Records, merge, read_records

_STEPS = 100
"""Most steps of the canary run on a tiny model, unless asked for more."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What the command line says; see ``fedward privacy audit --help``."""

    plan: Path
    data: Path | None = None
    out: Path
    confidence: float = 0.95
    canaries: int = 400
    releases: int = 2000
    rounds: int | None = None
    attacks: bool = False


def run_audit(
    options: AuditOptions, console: Console, *, stream: SecureStream | None = None
) -> dict[str, Any]:
    """Audit a plan, write ``audit.json`` and ``audit.html``, and return the former.

    Args:
        options: What to audit and how hard.
        console: Shows progress and the findings.
        stream: Source of everything random; left out, the operating system. Tests fix it.

    Raises:
        InvalidValue: The plan has no privacy that could be audited, or an option is out of range.
        PrivacyError: The audit refutes the claim; the reports are written nevertheless.
    """
    begun, plan = time.monotonic(), load_plan(options.plan)
    if not plan.privacy.enabled:
        raise InvalidValue(
            "epsilon", plan.privacy.epsilon, "a finite number: without privacy nothing is claimed"
        )
    if not 0.5 < options.confidence < 1:
        raise InvalidValue("confidence", options.confidence, "above 0.5 and below 1")
    stream = stream or SecureStream()
    with tempfile.TemporaryDirectory() as folder, console.status("audit") as status:
        report = _audit(plan, options, stream, Path(folder), status.update)
    report = dataclasses.replace(report, seconds=time.monotonic() - begun)
    document = write_audit(options.out, report)
    console.print(render_table(report))
    console.print(f"report: {options.out / 'audit.html'}", soft_wrap=True)
    refuted = [finding.name for finding in report.findings() if not finding.holds]
    if refuted:
        raise PrivacyError(
            f"the audit refutes the claim: {'; '.join(refuted)}. Do not train with this build; "
            f"see {options.out / 'audit.json'}"
        )
    return document


def _audit(
    plan: Plan,
    options: AuditOptions,
    stream: SecureStream,
    folder: Path,
    show: Callable[[str], None],
) -> AuditReport:
    show("building the model")
    rig = (
        tiny_rig(plan, folder, stream.child("records"))
        if options.data is None
        else real_rig(plan, options.data)
    )
    show("layer A: search for sensitivity")
    searches = _searches(rig.plan)
    rig.restart()
    shake(rig.model)
    own = search(rig_pairs(rig, stream.child("pairs")), mechanism(rig.plan))
    show("layer B: attack on single steps")
    bounds = _attacked_steps(rig.plan, searches, options, stream)
    rounds = _rounds(rig.plan, options)

    def canaries(name: str, *, noise: bool) -> CanaryBound:
        return audit_training(
            rig,
            canaries=options.canaries,
            rounds=rounds,
            confidence=options.confidence,
            stream=stream.child(name),
            noise=noise,
            on_step=lambda done, of: show(f"layer C: {name}, step {done} of {of}"),
        )

    seen, control = canaries("canaries", noise=True), canaries("without noise", noise=False)
    return AuditReport(
        plan=rig.plan,
        subject=rig.subject,
        confidence=options.confidence,
        rounds=rounds,
        searches=(*searches, own),
        releases=bounds,
        canaries=seen,
        canaries_without_noise=control,
        attacks=_attacks(plan, stream, show) if options.attacks else None,
        seconds=0.0,
    )


def _searches(plan: Plan) -> tuple[Sensitivity, Sensitivity]:
    """The worst neighbours on the micro model: alone, and in company."""
    step = mechanism(plan)
    pairs = list(micro_pairs(step))
    alone, company = ([p for p in pairs if bool(p.units) == others] for others in (False, True))
    return search(alone, step), search(company, step)


def _attacked_steps(
    plan: Plan,
    searches: tuple[Sensitivity, Sensitivity],
    options: AuditOptions,
    stream: SecureStream,
) -> tuple[ReleaseBound, ...]:
    """Everybody drawn, alone and in company, where noise shows best; then the plan's rate."""
    planned = mechanism(plan)
    everybody = dataclasses.replace(planned, sampling_rate=1.0)
    alone, company = (found.pair for found in searches)
    cases = [(alone, everybody), (company, everybody)]
    if planned.sampling_rate < 1:
        cases.append((alone, planned))
    return tuple(
        attack_releases(
            pair,
            step,
            delta=plan.privacy.delta,
            confidence=options.confidence,
            count=options.releases,
            stream=stream.child("releases", str(number)),
        )
        for number, (pair, step) in enumerate(cases)
    )


def _rounds(plan: Plan, options: AuditOptions) -> int:
    planned = plan.rounds.count
    if options.rounds is not None:
        return min(planned, options.rounds)
    if options.data is not None:
        return planned
    return min(planned, max(1, _STEPS // plan.rounds.steps))


def _attacks(plan: Plan, stream: SecureStream, show: Callable[[str], None]) -> Attacks:
    demo, data, _ = prepare_demo(0, Console(quiet=True))
    # What protects is the plan's. A long training on few records, whose classes are drawn so that
    # whoever knows one has seen it: without protection there is something to find, and the noise
    # grows with the steps, to the same epsilon.
    rounds = dataclasses.replace(
        demo.rounds,
        count=16,
        spare=0,
        steps=10,
        sampling_rate=0.25,
        normaliser=7.5,
        learning_rate=0.008,
    )
    demo = dataclasses.replace(demo, privacy=plan.privacy, rounds=rounds)
    records = read_records(data / "train.jsonl", demo)
    label, classes = demo.data.label, demo.task.labels
    drawn = stream.child("classes").integers(len(records.rows), len(classes))
    own = (unit[: plan.privacy.records_per_unit] for unit in records.units)
    kept = [
        Records(
            rows=tuple({**records.rows[n], label: classes[drawn[n]]} for n in unit),
            units=(tuple(range(len(unit))),),
        )
        for unit in own
    ]
    return attack(demo, merge(kept), stream=stream.child("attacks"), progress=show)
