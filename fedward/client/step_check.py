"""A check, before anything is reserved, that a plan's model can be trained privately at all."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from fedward.errors import ModelError, UncoveredParameters
from fedward.plan import Plan
from fedward.privacy.coverage import Coverage, coverage
from fedward.privacy.probe import check_independence
from fedward.tuning.objectives import Encoded, collate, encoded_as, loss_per_example, made_up
from fedward.tuning.tuned import tuned_model, with_reference

_LOG = logging.getLogger(__name__)
_LENGTHS = (3, 5, 8)


def _off_reference(encoded: Encoded) -> Encoded:
    """The examples of ``dpo`` and ``kto`` about one step from their reference, each another one.

    Far from it their losses are flat, and hide what records do to each other's gradients; right at
    it all have moved alike, and a mean over the batch is what each has alone.
    """
    if encoded.beta is None:
        return encoded
    moved = (
        dataclasses.replace(example, reference=example.reference - (number + 1) / 2 / encoded.beta)
        for number, example in enumerate(encoded.examples)
    )
    return dataclasses.replace(encoded, examples=tuple(moved))


@lru_cache(maxsize=16)
def check_step(plan: Plan, device: str = "cpu") -> Coverage:
    """Check on made-up records that the plan's step keeps records apart; once a process.

    No record of the site is read, so that the answer says nothing about patients.

    Returns:
        How gradients will be taken; where that is the slow way, it is also logged as a warning.

    Raises:
        ModelError: No clipping could bound what one unit changes, a record of ``max_length`` does
            not fit the model, or the model cannot be loaded.
    """
    tuned = tuned_model(plan, device)
    known = len(tuned.tokenizer)
    lengths = (*_LENGTHS, plan.task.max_length)
    rows = [tuple((7 * n + place) % known for place in range(n)) for n in lengths]
    examples = [made_up(plan, row, number % 2) for number, row in enumerate(rows)]
    encoded = encoded_as(plan, examples, padding=0)

    def loss(model: nn.Module, indices: Sequence[int]) -> Tensor:
        return loss_per_example(model, collate(encoded, indices, device))

    try:
        encoded = _off_reference(with_reference(tuned, encoded))
        with torch.no_grad():
            loss(tuned.model, [len(_LENGTHS)])
    except (IndexError, RuntimeError) as error:
        raise ModelError(
            f"max_length = {plan.task.max_length}: the model does not take so many tokens, and a "
            "record that long would end its training; lower it"
        ) from error
    try:
        check_independence(tuned.model, loss, range(len(_LENGTHS)))
        covered = coverage(tuned.model)
    except UncoveredParameters as error:
        raise ModelError(f"the plan cannot be trained privately: {error}") from error
    if not covered.single_pass:
        _LOG.warning("%s", covered)
    return covered
