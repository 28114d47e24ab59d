"""A check that a loss keeps its records apart, to run once before private training.

Shapes cannot show that the records of a batch influence each other: a loss divided by the batch's
token count, batch statistics, or a layer that reads the batch in another order. Any of them lets
one unit change what the others contribute, and then no clip bounds one unit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedward.errors import UncoveredParameters
from fedward.privacy.engine import UnitGradients

_LOSS_TOLERANCE = 0.05  # half precision and padding move a loss by less; coupling by a factor
_LEAK_TOLERANCE = 1e-6


def check_independence(
    model: nn.Module, loss: Callable[[nn.Module, Sequence[int]], Tensor], records: Sequence[int]
) -> None:
    """Check on a few records that row i of the loss, and of the gradients, is record i's alone.

    Args:
        model: As for :func:`~fedward.privacy.training.train_steps`; it comes back as it was.
        loss: As for ``train_steps``.
        records: Two to about eight records, best of different lengths. Nothing else is read, and
            nothing about them is told but whether the check holds.

    Raises:
        UncoveredParameters: Records influence each other, or no clipping could bound a unit.
    """
    if len(records) < 2:
        raise ValueError(f"at least two records are needed, not {len(records)}")
    training = model.training
    try:
        model.eval()
        for module in model.modules():
            # In eval mode bitsandbytes repacks NF4 weights on some CPUs for inference only.
            module.training = type(module).__module__.startswith("bitsandbytes.")
        _check_losses(model, loss, records)
        _check_gradients(model.train(), loss, records)
    finally:
        model.train(training)


def _check_losses(
    model: nn.Module, loss: Callable[[nn.Module, Sequence[int]], Tensor], records: Sequence[int]
) -> None:
    with torch.no_grad():
        together = loss(model, records).float()
        alone = torch.cat([loss(model, [record]).float() for record in records])
    apart = (together - alone).abs() > _LOSS_TOLERANCE * (alone.abs() + 1e-3)
    if bool((apart & together.isfinite() & alone.isfinite()).any()):
        raise UncoveredParameters(
            "a record's loss is another in a batch than alone: divide each record's loss by its "
            "own token count, and use no batch statistics"
        )


def _check_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Sequence[int]], Tensor], records: Sequence[int]
) -> None:
    engine = UnitGradients(model)
    try:
        engine.begin(len(records))
        torch.autograd.backward(loss(model, records)[0])
        engine.collect()
        if not engine.single_pass:
            return  # then a backward pass holds one unit, and there is nobody to influence
        for name, rows in engine.rows():
            others = float(rows[1:].abs().max())
            if not others <= _LEAK_TOLERANCE * float(rows[0].abs().max()):
                raise UncoveredParameters(
                    f"the loss of one record has gradients in {name} for the rows of others: a "
                    "layer mixes the records of a batch"
                )
    finally:
        engine.to_standard_module()
        model.zero_grad(set_to_none=True)
