"""Make what the plans beside this file start from: preferences of four clinics, and a base model.

    python examples/preferences/prepare.py out/preferences

The rule that anybody can check: a good answer names one of three signs out of eight. The base, a
small Llama trained here on public answers of all kinds, names any of them. Nobody in the records
exists. Held-out prompts join a place and a sign that training never joins, and the pairs of answers
of one split are not those of the other.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedward.tuning.small import build_llama, build_tokenizer

SIGNS = ("cough", "fever", "rash", "pain", "nausea", "itch", "chills", "swelling")
GOOD = 3
PLACES = ("ward", "clinic", "home", "street", "bath", "garden", "school", "train")
CLINICS = ("north", "east", "south", "west")
PATIENTS = 300  # of each clinic


def prompts(split: str) -> list[str]:
    """The questions of a split."""
    return [
        f"at the {place} after {sign} ?"
        for (i, place), (j, sign) in itertools.product(enumerate(PLACES), enumerate(SIGNS))
        if ((i + j) % 4 == 0) == (split == "test")
    ]


def answers(split: str) -> list[tuple[str, str]]:
    """Better and worse answers of a split."""
    pairs = itertools.product(SIGNS[:GOOD], SIGNS[GOOD:])
    return [pair for n, pair in enumerate(pairs) if (n % 4 == 0) == (split == "test")]


def pairs(split: str) -> list[dict[str, str]]:
    """Two preferences of every patient."""
    asked, known = prompts(split), answers(split)
    patients = PATIENTS if split == "train" else 32
    rows = list[dict[str, str]]()
    for clinic, patient, turn in itertools.product(CLINICS, range(patients), range(2)):
        number = len(rows)
        good, bad = known[number * 7 % len(known)]
        rows.append(
            {
                "clinic": clinic,
                "patient": f"{clinic}-{split}-{patient}",
                "prompt": asked[(number * 5 + turn) % len(asked)],
                "chosen": f" {good}",
                "rejected": f" {bad}",
            }
        )
    return rows


def single(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The same answers one by one, desirable or not; each patient has one of either kind."""
    found = list[dict[str, Any]]()
    for number, row in enumerate(rows):
        key = "chosen" if number % 2 else "rejected"
        kept = {name: row[name] for name in ("clinic", "patient", "prompt")}
        found.append(kept | {"completion": row[key], "label": key == "chosen"})
    return found


def teach(folder: Path, steps: int = 150) -> None:
    """Train the model in a folder to answer every question with any sign."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = build_words()
    texts = [f"{p} {sign}{tokenizer.eos_token}" for p in prompts("train") for sign in SIGNS]
    rows = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        logits = model(input_ids=batch, attention_mask=batch != tokenizer.pad_token_id).logits
        loss = cross_entropy(
            logits[:, :-1].transpose(1, 2), batch[:, 1:], ignore_index=int(tokenizer.pad_token_id)
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.save_pretrained(folder)


def build_words() -> Any:  # noqa: ANN401  # transformers' tokenizer
    """A tokenizer of these words; questions are no talk, so that it has no chat template."""
    tokenizer = build_tokenizer([*prompts("train"), *prompts("test")] * 4, 400)
    tokenizer.chat_template = None
    return tokenizer


def main(folder: Path) -> None:
    """Write everything into a folder."""
    for split in ("train", "test"):
        rows = pairs(split)
        for name, kept in (("pairs", rows), ("answers", single(rows))):
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in kept)
            (place / f"{split}.jsonl").write_text(text, encoding="utf-8")
    build_llama(folder / "base", build_words(), max_length=32)
    teach(folder / "base")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
