"""What is learned: records as tokens, and the loss of each example by itself.

The loss is one number an example, made of that example alone. A mean over the batch's tokens would
couple examples and break the clip of differential privacy, and so would KTO's estimate of how far
the model has moved, which is taken over the batch: it is left at 0 here (docs/adr/0012).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedTokenizerBase

from fedward.errors import DataError, ModelError
from fedward.plan import Plan
from fedward.tuning.columns import answer_columns
from fedward.tuning.prompts import input_text, segments, uses_chat
from fedward.tuning.records import Records, Row, truth_of

IGNORED = -100
"""Target of a position that is not learned."""

Batch = dict[str, Tensor]

_OTHER = "rejected_"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as numbers.

    Args:
        tokens: Token ids, 1 to the plan's ``max_length``.
        targets: For each token itself or :data:`IGNORED`; ``classify``: the class.
        rejected: ``dpo``: the same prompt with the other answer.
        weight: ``kto``: of its loss; below zero where the answer is undesirable.
        reference: ``dpo``, ``kto``: the :func:`scores` of the reference; see :func:`referred`.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    rejected: "Example | None" = None
    weight: float = 1.0
    reference: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Examples in the order of their records.

    Args:
        examples: One a record.
        padding: The token id that fills up a batch.
        classify: Whether targets are classes.
        beta: ``dpo``, ``kto``: how hard the reference holds; None for others.
    """

    examples: tuple[Example, ...]
    padding: int
    classify: bool
    beta: float | None = None


def encode(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Encoded:
    """Tokenize every record as the plan's objective wants it.

    Raises:
        ConfigurationError: The model's chat template is missing or does not fit the records.
        DataError: A label that is not the plan's.
        ModelError: The tokenizer has no padding token.
    """
    how = _classify if plan.task.objective == "classify" else _text
    return encoded_as(plan, how(records, tokenizer, plan), _id(tokenizer.pad_token_id))


def encoded_as(plan: Plan, examples: Iterable[Example], padding: int) -> Encoded:
    """Examples of the plan's objective as batches are made of them."""
    objective = plan.task.objective
    return Encoded(
        examples=tuple(examples),
        padding=padding,
        classify=objective == "classify",
        beta=plan.task.beta if objective in {"dpo", "kto"} else None,
    )


def made_up(plan: Plan, tokens: tuple[int, ...], number: int) -> Example:
    """An example of the plan's objective that is nobody's, for checks.

    Args:
        plan: Its objective.
        tokens: The example's.
        number: Its class, or odd where the answer is desirable.
    """
    backwards = tokens[::-1]
    return Example(
        tokens=tokens,
        targets=(number,) if plan.task.objective == "classify" else tokens,
        rejected=(
            Example(tokens=backwards, targets=backwards) if plan.task.objective == "dpo" else None
        ),
        weight=1.0 if number % 2 else -1.0,
    )


def collate(encoded: Encoded, indices: Sequence[int], device: torch.device | str) -> Batch:
    """Some examples as one batch, padded on the right to the longest of them.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (batch, seq); ``labels`` of the same shape, or
        (batch,) for ``classify``; all int64. ``dpo`` has the three again for the other answers, as
        ``rejected_input_ids`` and so on. ``dpo`` and ``kto`` have ``reference``, ``weight`` and
        ``beta`` of shape (batch,), float32.
    """
    chosen = [encoded.examples[index] for index in indices]
    batch = _padded(chosen, encoded)
    others = [example.rejected for example in chosen if example.rejected is not None]
    if others:
        batch |= {f"{_OTHER}{name}": part for name, part in _padded(others, encoded).items()}
    if encoded.beta is not None:
        batch["reference"] = torch.tensor([example.reference for example in chosen])
        batch["weight"] = torch.tensor([example.weight for example in chosen])
        batch["beta"] = torch.full((len(chosen),), encoded.beta)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _padded(chosen: Sequence[Example], encoded: Encoded) -> Batch:
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
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_and_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each example, shape (batch,), float32, and the model's logits.

    ``sft``: the mean negative log likelihood over the example's own targets, 0 where it has none;
    ``classify``: the cross entropy of its class. Row i depends on example i alone.
    """
    labels = batch["labels"]
    if labels.dim() == 1:
        logits = _logits(model, batch)
        return cross_entropy(logits.float(), labels, reduction="none"), logits
    likelihoods, logits = _likelihoods(model, batch)
    learned = (labels[:, 1:] != IGNORED).sum(dim=1)
    return -likelihoods / learned.clamp(min=1), logits


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """Log likelihood of each example's answer, shape (batch,), float32.

    ``dpo``: less that of the other answer, so that above 0 the better one is preferred.
    """
    found = _likelihoods(model, batch)[0]
    if f"{_OTHER}labels" not in batch:
        return found
    others = {n.removeprefix(_OTHER): part for n, part in batch.items() if n.startswith(_OTHER)}
    return found - _likelihoods(model, others)[0]


def preference_loss(found: Tensor, batch: Batch) -> Tensor:
    """Loss of each example of ``dpo`` or ``kto``, shape (batch,), float32.

    ``dpo``: the sigmoid loss of Rafailov et al. 2023 (arXiv 2305.18290), equation 7. ``kto``: the
    loss of Ethayarajh et al. 2024 (arXiv 2402.01306), section 4, with the reference point z0 = 0,
    which is the unpaired APO-zero of D'Oosterlinck et al. 2024 (arXiv 2408.06266).

    Args:
        found: The model's :func:`scores`.
        batch: From :func:`collate`.
    """
    moved = batch["beta"] * (found - batch["reference"])
    if f"{_OTHER}labels" in batch:
        return -logsigmoid(moved)
    weight = batch["weight"]
    return weight.abs() * torch.sigmoid(-weight.sign() * moved)


def prefers(found: Tensor, batch: Batch) -> Tensor:
    """Whether the model judges each example of ``dpo`` or ``kto`` as its record does, (batch,).

    ``dpo``: the better answer is the likelier one; a tie is wrong. ``kto``: the answer is likelier
    than it is for the reference just where it is desirable.

    Args:
        found: The model's :func:`scores`.
        batch: From :func:`collate`.
    """
    if f"{_OTHER}labels" in batch:
        return found > 0
    return (found > batch["reference"]) == (batch["weight"] > 0)


def loss_per_example(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each example, shape (batch,), float32.

    See :func:`loss_and_logits` and :func:`preference_loss`. Row i depends on example i alone.
    """
    if "reference" in batch:
        return preference_loss(scores(model, batch), batch)
    return loss_and_logits(model, batch)[0]


@torch.no_grad()
def referred(model: nn.Module, encoded: Encoded, *, batch_size: int = 64) -> Encoded:
    """The examples of ``dpo`` or ``kto`` with this model's scores as their reference.

    Others come back as they are. The reference is no part of the gradient, so that it is computed
    once; that of an example depends on the example and the model alone.

    Args:
        model: The reference; its mode is restored.
        encoded: From :func:`encode`.
        batch_size: Examples at a time.
    """
    if encoded.beta is None:
        return encoded
    device = next(model.parameters()).device
    known = list(encoded.examples)
    training = model.training
    model.eval()
    try:
        for indices in by_length(encoded, batch_size):
            found = scores(model, collate(encoded, indices, device)).tolist()
            for index, score in zip(indices, found, strict=True):
                known[index] = dataclasses.replace(known[index], reference=score)
    finally:
        model.train(training)
    return dataclasses.replace(encoded, examples=tuple(known))


def by_length(encoded: Encoded, batch_size: int) -> Iterator[list[int]]:
    """The numbers of all examples in batches, those of similar length together."""
    order = sorted(range(len(encoded.examples)), key=lambda i: len(encoded.examples[i].tokens))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits


def _likelihoods(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log likelihood of each row's targets, shape (batch,), float32, and the logits."""
    labels = batch["labels"]
    # Trained vectors before the input have logits too.
    logits = _logits(model, batch)[:, -labels.shape[1] :]
    tokens = cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        labels[:, 1:],
        reduction="none",
        ignore_index=IGNORED,
    )
    return -tokens.sum(dim=1), logits


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


def _text(records: Records, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> list[Example]:
    task, answers = plan.task, answer_columns(plan)
    examples = []
    for row in records.rows:
        example, *others = [_written(row, tokenizer, plan, a) for a in answers or (None,)]
        if others:
            example = dataclasses.replace(example, rejected=others[0])
        if task.objective == "kto":
            good = truth_of(row[plan.data.label])
            weight = task.desirable_weight if good else -task.undesirable_weight
            example = dataclasses.replace(example, weight=weight)
        examples.append(example)
    return examples


def _written(
    row: Row, tokenizer: PreTrainedTokenizerBase, plan: Plan, answer: str | None
) -> Example:
    """A text, or a prompt with the answer in a column."""
    chat = uses_chat(plan.data, tokenizer)  # such a template writes its own first token
    first = [] if chat or tokenizer.bos_token_id is None else [_id(tokenizer.bos_token_id)]
    tokens, targets = list(first), [IGNORED] * len(first)
    given, learned = 0, False
    for segment in segments(row, plan, tokenizer, answer):
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
    return Example(tokens=tuple(tokens[i] for i in keep), targets=tuple(targets[i] for i in keep))


def _id(token: object) -> int:
    if not isinstance(token, int):
        raise ModelError("the tokenizer has no padding token; load it by load_base")
    return token
