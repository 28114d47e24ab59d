"""The demo's base model: a small Llama that reads public text, trained here once and then kept."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedward.canonical import canonical_json, digest
from fedward.plan import Plan
from fedward.server.central.full import FullTraining, train_full
from fedward.simulations.notes import public_corpus, vocabulary
from fedward.tuning.objectives import collate, encode, loss_per_example
from fedward.tuning.records import group
from fedward.tuning.small import build_llama, build_tokenizer

SETTINGS = FullTraining(
    steps=300, batch_size=64, learning_rate=3e-3, weight_decay=0.01, save_every=100
)
"""The full training of the base."""

ROWS = 12_000
"""How much public text it reads; far fewer, and it learns the rows by heart."""

_VOCABULARY = 1536  # every word of the notes is one token
_HIDDEN, _LAYERS, _HEADS = 64, 2, 4
_WIDEN = 2.5
"""Llama's start, standard deviation 0.02, suits widths of thousands: at 64 the layers hardly see
each other, and the base learns to tell words but not what stands before them."""


def base_model(
    cache: Path,
    plan: Plan,
    *,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Train the base of a plan on public text, unless it was trained before.

    Args:
        cache: Where bases are kept, by what they were made from; an interrupted training goes on.
        plan: Its labels, template and length say what the base reads.
        seed: Of the public text and the weights.
        on_step: Told the number of steps done, of ``SETTINGS.steps``, and the last loss.

    Returns:
        A folder with model and tokenizer.
    """
    # The generator is frozen, so a sample of its text stands for all of it.
    made_from = canonical_json(
        [
            [seed, ROWS, [row["text"] for row in public_corpus(seed, 20)], vocabulary()],
            dataclasses.asdict(SETTINGS),
            [_VOCABULARY, _HIDDEN, _LAYERS, _HEADS, _WIDEN],
            [plan.data.template, plan.task.max_length, list(plan.task.labels)],
        ]
    )
    folder = cache / f"base-{digest('demo base', made_from).hex()[:16]}"
    if folder.exists():
        return folder
    work = folder.with_name(folder.name + "-training")
    tokenizer = build_tokenizer([*vocabulary(), plan.data.template or ""], _VOCABULARY)
    build_llama(
        work / "model",
        tokenizer,
        hidden=_HIDDEN,
        layers=_LAYERS,
        heads=_HEADS,
        max_length=2 * plan.task.max_length,
        seed=seed,
        labels=plan.task.labels,
    )
    model = AutoModelForSequenceClassification.from_pretrained(work / "model", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(_WIDEN)
    encoded = encode(group(public_corpus(seed, ROWS), None), tokenizer, plan)

    def loss(model: nn.Module, indices: Sequence[int]) -> Tensor:
        return loss_per_example(model, collate(encoded, indices, "cpu"))

    examples, checkpoint = len(encoded.examples), work / "checkpoint.safetensors"
    settings = dataclasses.replace(SETTINGS, seed=seed)
    train_full(model, examples, loss, settings, checkpoint=checkpoint, on_step=on_step)
    model.save_pretrained(work / "model")
    (work / "model").replace(folder)  # whole or not at all
    shutil.rmtree(work)
    return folder
