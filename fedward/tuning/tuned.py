"""The plan's model, ready to train: the base with its tuner attached, loaded once a process."""

from dataclasses import dataclass
from functools import lru_cache

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedward.plan import Plan
from fedward.tuning.adapter import adapter_state, from_bytes, layout, load_adapter, to_bytes
from fedward.tuning.models import load_base
from fedward.tuning.objectives import Encoded, referred
from fedward.tuning.tuners import attach, personal
from fedward.tuning.vector import Layout


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A loaded model with its tuner.

    Args:
        model: Its adapter is whoever's used the model last: load one before every use.
        tokenizer: The base's.
        start: The adapter's first state, safetensors bytes; a public function of the plan.
        layout: Names and shapes of the trainable tensors that the sites share.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    start: bytes
    layout: Layout


@lru_cache(maxsize=2)
def tuned_model(plan: Plan, device: str = "cpu") -> Tuned:
    """Load the plan's base, attach its tuner and keep both for the next call.

    Raises:
        ModelError: The base cannot be loaded, or is not the one the plan names.
        ConfigurationError: The plan's tuner does not fit the model.
    """
    base, tokenizer = load_base(plan.model, plan.task, device=device)
    model = attach(base, plan)
    return Tuned(
        model=model,
        tokenizer=tokenizer,
        start=to_bytes(adapter_state(model)),
        layout=tuple(entry for entry in layout(model) if entry[0] not in personal(model, plan)),
    )


def with_reference(tuned: Tuned, encoded: Encoded, *, batch_size: int = 64) -> Encoded:
    """The examples of ``dpo`` or ``kto`` with what the reference says of each; others as they are.

    The reference is the model as the plan starts it: the base itself for all methods but those that
    put vectors before the input.

    Args:
        tuned: The plan's model; its adapter stays as it is.
        encoded: From :func:`~fedward.tuning.objectives.encode`.
        batch_size: Examples that the reference reads at a time.
    """
    if encoded.beta is None:
        return encoded
    before = adapter_state(tuned.model)
    load_adapter(tuned.model, from_bytes(tuned.start))
    try:
        return referred(tuned.model, encoded, batch_size=batch_size)
    finally:
        load_adapter(tuned.model, before)
