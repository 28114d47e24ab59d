"""Classification on transformers' own trainer, because TRL has none.

Texts are read as in prediction (:func:`fedward.server.central.predicting.input_ids`), and cut at
their end as at the sites.
"""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from peft import PeftConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
)

from fedward.errors import DataError
from fedward.server.central.classify_config import ClassifyConfig
from fedward.server.central.predicting import input_ids, longest


class ClassifyTrainer(Trainer):
    """transformers' trainer of a sequence classifier, called as TRL's trainers are.

    Args:
        model: A sequence classifier that knows its labels; under PEFT already, or not.
        args: With ``max_length``.
        processing_class: The tokenizer.
        train_dataset: A text or messages, and ``label``, by the label's name.
        eval_dataset: The same, each under its use.
        peft_config: Of the adapter that is put around the model.
        **given: What transformers' trainer takes.

    Raises:
        DataError: A label that the model does not know.
    """

    def __init__(
        self,
        *,
        model: Any,  # noqa: ANN401  # transformers' or PEFT's
        args: ClassifyConfig,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: DatasetDict | None = None,
        peft_config: PeftConfig | None = None,
        **given: Any,  # noqa: ANN401  # theirs
    ) -> None:
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
            if args.activation_checkpointing:
                model.enable_input_require_grads()
        numbers: dict[str, int] = model.config.label2id
        most = min(args.max_length, longest(model, processing_class))

        def prepare(rows: Dataset) -> Dataset:
            return Dataset.from_list(
                [_example(row, numbers, processing_class, most) for row in rows]
            )

        others: dict[str, Any] = {
            str(name): prepare(rows) for name, rows in (eval_dataset or {}).items()
        }
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=DataCollatorWithPadding(processing_class),
            train_dataset=prepare(train_dataset),
            eval_dataset=others or None,
            compute_metrics=_accuracy,
            **given,
        )


def _example(
    row: Any,  # noqa: ANN401  # a mapping of text, messages and label
    numbers: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    label, (talk,) = row["label"], [row[name] for name in row if name != "label"]
    if label not in numbers:
        raise DataError(f"label {label!r}: the model knows {', '.join(numbers)}")
    ids = input_ids(talk, tokenizer, "classifier")
    if len(ids) > max_length and isinstance(talk, str):  # an encoder's last token stays the last
        ids = tokenizer(talk, truncation=True, max_length=max_length)["input_ids"]
    ids = ids[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": numbers[label]}


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(found.predictions, axis=-1) == found.label_ids))}
