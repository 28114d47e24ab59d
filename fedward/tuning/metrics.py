"""How good a model is on records it never saw, and whether a difference is more than luck."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedward.errors import DataError
from fedward.tuning.objectives import (
    Encoded,
    by_length,
    collate,
    loss_and_logits,
    preference_loss,
    prefers,
    scores,
)
from fedward.tuning.resampling import bootstrap, each_row


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """An evaluation.

    Args:
        loss: Mean of ``losses``.
        losses: ``(n,)`` float64, each example's own loss.
        correct: ``(n,)`` float64 of 0 and 1; None for ``sft``. ``dpo``: whether the better answer
            is likelier, a tie not. ``kto``: whether the answer has become likelier than it was for
            the reference just where it is desirable.
        accuracy: Mean of ``correct``.
        macro_f1: Mean F1 over the classes that occur, unweighted; ``classify`` alone.
    """

    loss: float
    losses: npt.NDArray[np.float64]
    correct: npt.NDArray[np.float64] | None = None
    accuracy: float | None = None
    macro_f1: float | None = None


@torch.no_grad()
def evaluate(model: nn.Module, encoded: Encoded, *, batch_size: int = 64) -> Metrics:
    """Evaluate without dropout; the model's mode is restored.

    Args:
        model: Gives logits.
        encoded: At least one example.
        batch_size: Examples at a time; examples of similar length go together.

    Raises:
        DataError: No examples.
    """
    count = len(encoded.examples)
    if count == 0:
        raise DataError("nothing to evaluate on: expected at least one held-out record")
    losses, predicted = np.zeros(count), np.zeros(count, dtype=np.int64)
    preferring = encoded.beta is not None
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for indices in by_length(encoded, batch_size):
            batch = collate(encoded, indices, device)
            if preferring:
                found = scores(model, batch)
                loss = preference_loss(found, batch)
                predicted[indices] = prefers(found, batch).cpu().numpy()
            else:
                loss, logits = loss_and_logits(model, batch)
                if encoded.classify:
                    predicted[indices] = logits.argmax(dim=-1).cpu().numpy()
            losses[indices] = loss.double().cpu().numpy()
    finally:
        model.train(training)
    if preferring:
        right = predicted.astype(np.float64)
        accuracy = float(right.mean())
        return Metrics(loss=float(losses.mean()), losses=losses, correct=right, accuracy=accuracy)
    if not encoded.classify:
        return Metrics(loss=float(losses.mean()), losses=losses)
    classes = np.array([example.targets[0] for example in encoded.examples])
    correct = (predicted == classes).astype(np.float64)
    return Metrics(
        loss=float(losses.mean()),
        losses=losses,
        correct=correct,
        accuracy=float(correct.mean()),
        macro_f1=_macro_f1(classes, predicted),
    )


def paired_interval(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Difference of means over the same examples, with its 95 % paired bootstrap interval.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile).

    Args:
        first: ``(n,)`` scores of one model.
        second: ``(n,)`` scores of another on the same examples.
        seed: Seed of the resampling.
        resamples: How many, at least 100 make sense.

    Returns:
        (mean of first - second, lower end, upper end).

    Raises:
        DataError: Different lengths, or none.
    """
    if first.shape != second.shape or first.size == 0:
        raise DataError("a paired comparison needs scores of the same examples, at least one")
    difference = first - second
    low, high = bootstrap(
        lambda rows: difference[rows].mean(keepdims=True),
        each_row(difference.size),
        seed=seed,
        resamples=resamples,
    )
    return float(difference.mean()), float(low[0]), float(high[0])


def _macro_f1(classes: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    scores = []
    for label in np.unique(classes):
        hits = float(((predicted == label) & (classes == label)).sum())
        scores.append(2 * hits / float((predicted == label).sum() + (classes == label).sum()))
    return float(np.mean(scores))
