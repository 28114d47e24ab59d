"""What the federation is compared with: each hospital alone, and all data in one place.

All of them start from the same adapter, run the same rounds and steps with the same sampling rate
and sigma, and are evaluated on the same public test records.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedward.client.trainer import mechanism, train_model
from fedward.plan import Plan
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.tuning.adapter import adapter_state, from_bytes, load_adapter, to_bytes
from fedward.tuning.metrics import Metrics, evaluate
from fedward.tuning.objectives import encode
from fedward.tuning.records import Records, merge
from fedward.tuning.tuned import tuned_model, with_reference

CENTRAL, CENTRAL_NO_PRIVACY = "central", "central-no-privacy"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One alternative to the federation.

    Args:
        name: ``alone-SITE``, :data:`CENTRAL` or :data:`CENTRAL_NO_PRIVACY`.
        plan: What it trains by.
        records: What it trains on.
        step: Its DP-SGD step; finding sigma takes seconds, so it is found once for all.
    """

    name: str
    plan: Plan
    records: Records
    step: Mechanism


def alone(site: str) -> str:
    """The name of the comparison with one site's own training."""
    return f"alone-{site}"


def comparisons(plan: Plan, sites: Mapping[str, Records]) -> list[Comparison]:
    """Every alternative, those that take longest first."""
    everything = pooled(sites)
    together = plan.rounds.normaliser * len(sites)
    found = [
        Comparison(
            name=CENTRAL,
            plan=plan,
            records=everything,
            step=mechanism(plan, normaliser=together),
        )
    ]
    if plan.privacy.enabled:
        free = dataclasses.replace(
            plan, privacy=dataclasses.replace(plan.privacy, epsilon=math.inf)
        )
        step = mechanism(free, normaliser=together)
        found.append(Comparison(name=CENTRAL_NO_PRIVACY, plan=free, records=everything, step=step))
    step = mechanism(plan)
    found += [
        Comparison(name=alone(site), plan=plan, records=records, step=step)
        for site, records in sorted(sites.items(), key=lambda site: -len(site[1].units))
    ]
    return found


def measure(
    comparison: Comparison, test: Records, on_round: Callable[[int], None] = lambda _: None
) -> Metrics:
    """Train an alternative, and evaluate it on the public test records."""
    plan = comparison.plan
    adapter = train_in_one_place(plan, comparison.records, step=comparison.step, on_round=on_round)
    return evaluate_adapter(plan, adapter, test)


def train_in_one_place(
    plan: Plan,
    records: Records,
    *,
    step: Mechanism | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Train one adapter on these records without a federation.

    Args:
        plan: The plan; its privacy holds for these records alike.
        records: One hospital's records, or those of several together.
        step: The DP-SGD step; left out, the plan's own, which suits one hospital: the normaliser
            grows with the number of sites whose records these are.
        on_round: Called after each round.

    Returns:
        The adapter's whole state, safetensors bytes.
    """
    tuned = tuned_model(plan)
    model = tuned.model
    load_adapter(model, from_bytes(tuned.start))
    encoded = with_reference(tuned, encode(records, tuned.tokenizer, plan))
    step = mechanism(plan) if step is None else step
    stream = SecureStream()
    for number in range(1, plan.rounds.count + 1):
        train_model(
            model,
            records.units,
            encoded,
            plan,
            step,
            steps=plan.rounds.steps,
            stream=stream,
        )
        on_round(number)
    return to_bytes(adapter_state(model))


def evaluate_adapter(plan: Plan, adapter: bytes, test: Records) -> Metrics:
    """Evaluate an adapter on the public test records."""
    tuned = tuned_model(plan)
    load_adapter(tuned.model, from_bytes(adapter))
    return evaluate(tuned.model, with_reference(tuned, encode(test, tuned.tokenizer, plan)))


def pooled(sites: Mapping[str, Records]) -> Records:
    """All sites' records in one place."""
    parts: Sequence[Records] = [sites[name] for name in sorted(sites)]
    return merge(parts)
