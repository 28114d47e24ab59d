"""What is learned: records as tokens, and the loss of each example by itself.

The loss is one number an example, normalised by that example alone. A mean over the batch's tokens
would couple examples and break the clip of differential privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from fedward.errors import DataError, ModelError
from fedward.plan import Plan
from fedward.tuning.prompts import input_text, segments, uses_chat
from fedward.tuning.records import Records

IGNORED = -100
"""Target of a position that is not learned."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as numbers.

    Args:
        tokens: Token ids, 1 to the plan's ``max_length``.
        targets: ``sft``: for each token itself or :data:`IGNORED`; ``classify``: the class.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Examples in the order of their records.

    Args:
        examples: One a record.
        padding: The token id that fills up a batch.
        classify: Whether targets are classes.
    """

    examples: tuple[Example, ...]
    padding: int
    classify: bool


def encode(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Encoded:
    """Tokenize every record as the plan's objective wants it.

    Raises:
        ConfigurationError: The model's chat template is missing or does not fit the records.
        DataError: A label that is not the plan's.
        ModelError: The tokenizer has no padding token.
    """
    classify = plan.task.objective == "classify"
    examples = (_classify if classify else _sft)(records, tokenizer, plan)
    return Encoded(examples=tuple(examples), padding=_id(tokenizer.pad_token_id), classify=classify)


def collate(encoded: Encoded, indices: Sequence[int], device: torch.device | str) -> Batch:
    """Some examples as one batch, padded on the right to the longest of them.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (batch, seq); ``labels`` of shape (batch, seq)
        for ``sft`` and (batch,) for ``classify``; all int64.
    """
    chosen = [encoded.examples[index] for index in indices]
    longest = max(len(example.tokens) for example in chosen)
    tokens = torch.full((len(chosen), longest), encoded.padding)
    mask = torch.zeros((len(chosen), longest), dtype=torch.long)
    labels = torch.full((len(chosen), 1 if encoded.classify else longest), IGNORED)
    for row, example in enumerate(chosen):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        mask[row, : len(example.tokens)] = 1
        labels[row, : len(example.targets)] = torch.tensor(example.targets)
    if encoded.classify:
        labels = labels[:, 0]
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def loss_and_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each example, shape (batch,), float32, and the model's logits.

    ``sft``: the mean negative log likelihood over the example's own targets, 0 where it has none;
    ``classify``: the cross entropy of its class. Row i depends on example i alone.
    """
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = output.logits
    labels = batch["labels"]
    if labels.dim() == 1:
        return cross_entropy(logits.float(), labels, reduction="none"), logits
    logits = logits[:, -labels.shape[1] :]  # trained vectors before the input have logits too
    shifted = labels[:, 1:]
    tokens = cross_entropy(
        logits[:, :-1].float().transpose(1, 2), shifted, reduction="none", ignore_index=IGNORED
    )
    learned = (shifted != IGNORED).sum(dim=1)
    return tokens.sum(dim=1) / learned.clamp(min=1), logits


def loss_per_example(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each example, shape (batch,), float32; see :func:`loss_and_logits`."""
    return loss_and_logits(model, batch)[0]


def _classify(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> list[Example]:
    if not records.rows:
        return []
    texts = [input_text(row, plan.data) for row in records.rows]
    tokens = tokenizer(texts, truncation=True, max_length=plan.task.max_length)["input_ids"]
    numbers = {label: number for number, label in enumerate(plan.task.labels)}
    classes = [numbers.get(str(row[plan.data.label])) for row in records.rows]
    if None in classes:
        raise DataError(f"record {classes.index(None) + 1}: its label is not one of the plan's")
    empty = (_id(tokenizer.pad_token_id),)  # a model cannot attend to no token at all
    return [
        Example(tokens=tuple(ids) or empty, targets=(number,))
        for ids, number in zip(tokens, classes, strict=True)
        if number is not None
    ]


def _sft(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> list[Example]:
    chat = uses_chat(plan.data, tokenizer)  # such a template writes its own first token
    first = [] if chat or tokenizer.bos_token_id is None else [_id(tokenizer.bos_token_id)]
    examples = []
    for row in records.rows:
        tokens, targets = list(first), [IGNORED] * len(first)
        given, learned = 0, False
        for segment in segments(row, plan, tokenizer):
            ids = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            learned = learned or segment.learned
            given += 0 if learned else len(ids)
            tokens += ids
            targets += ids if segment.learned else [IGNORED] * len(ids)
        if not tokens:  # a model cannot attend to no token at all
            tokens, targets = [_id(tokenizer.pad_token_id)], [IGNORED]
        # A prompt too long gives way at its start, so that the answer and its question stay.
        cut = min(given, max(0, len(tokens) - plan.task.max_length))
        keep = [*range(len(first)), *range(len(first) + cut, len(tokens))][: plan.task.max_length]
        examples.append(
            Example(tokens=tuple(tokens[i] for i in keep), targets=tuple(targets[i] for i in keep))
        )
    return examples


def _id(token: object) -> int:
    if not isinstance(token, int):
        raise ModelError("the tokenizer has no padding token; load it by load_base")
    return token
