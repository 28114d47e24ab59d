"""The same work for both sides: a small Llama, rows for every stage, and how to train."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedward.tuning.small import build_llama, build_tokenizer

WORDS = ("cough", "fever", "rash", "pain", "nausea", "itch", "chills", "swelling", "ward", "dose")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training that both sides do.

    Args:
        stage: A stage of Fedward's jobs; TRL's trainer of that name.
        method: ``lora`` on every linear layer with r = 8, or ``full``.
    """

    stage: str
    method: str = "lora"


CASES = {
    "sft": Case(stage="sft"),
    "dpo": Case(stage="dpo"),
    "reward": Case(stage="reward"),
    "kto": Case(stage="kto"),
    "grpo": Case(stage="grpo"),
    "sft-full": Case(stage="sft", method="full"),
}


def settings(case: Case, steps: int) -> dict[str, Any]:
    """Keys of TRL's configuration that both sides set."""
    usual = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "seed": 0,
    }
    if case.stage == "grpo":
        return {**usual, "max_completion_length": 16, "num_generations": 4}
    return {**usual, "max_length": 96}


def prepare(folder: Path) -> None:
    """Write the models and the rows of every stage into a folder."""
    draw = np.random.default_rng(0)

    def says(count: int) -> str:
        return " ".join(draw.choice(WORDS, count))

    texts = [says(40) for _ in range(64)]
    tokenizer = build_tokenizer(texts, 400)
    size: dict[str, Any] = {"hidden": 128, "layers": 4, "heads": 4, "max_length": 128}
    build_llama(folder / "model", tokenizer, **size)
    # With its head, which otherwise either side would draw in its own way.
    build_llama(folder / "judge", tokenizer, labels=("reward",), **size)
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": says(10), "completion": " " + says(40)} for _ in range(160)],
        "dpo": [
            {"prompt": says(10), "chosen": " " + says(40), "rejected": " " + says(40)}
            for _ in range(160)
        ],
        "kto": [
            {"prompt": says(10), "completion": " " + says(40), "label": bool(i % 2)}
            for i in range(160)
        ],
        "grpo": [{"prompt": says(10), "word": WORDS[i % len(WORDS)]} for i in range(160)],
    }
    rows["reward"] = rows["dpo"]
    for stage, made in rows.items():
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
