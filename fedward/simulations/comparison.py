"""What the federation is compared with: each hospital alone, and all data in one place.

All of them start from the same adapter, run the same rounds and steps with the same sampling rate
and sigma, and are evaluated on the same public test records.
"""

from collections.abc import Callable, Mapping, Sequence

from fedward.client.trainer import mechanism, train_model
from fedward.plan import Plan
from fedward.privacy.noise import SecureStream
from fedward.tuning.adapter import adapter_state, from_bytes, load_adapter, to_bytes
from fedward.tuning.metrics import Metrics, evaluate
from fedward.tuning.objectives import encode
from fedward.tuning.records import Records, merge
from fedward.tuning.tuned import tuned_model


def train_in_one_place(
    plan: Plan,
    records: Records,
    *,
    sites: int = 1,
    on_round: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Train one adapter on these records without a federation.

    Args:
        plan: The plan; its privacy holds for these records alike.
        records: One hospital's records, or those of several together.
        sites: How many sites' records these are: the normaliser grows with them.
        on_round: Called after each round.

    Returns:
        The adapter's whole state, safetensors bytes.
    """
    tuned = tuned_model(plan)
    model = tuned.model
    load_adapter(model, from_bytes(tuned.start))
    encoded = encode(records, tuned.tokenizer, plan)
    step = mechanism(plan, normaliser=plan.rounds.normaliser * sites)
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
    return evaluate(tuned.model, encode(test, tuned.tokenizer, plan))


def pooled(sites: Mapping[str, Records]) -> Records:
    """All sites' records in one place."""
    parts: Sequence[Records] = [sites[name] for name in sorted(sites)]
    return merge(parts)
