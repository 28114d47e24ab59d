"""Make what the walk of docs/walk-central.md starts from: notes, public text, and a tiny model.

    python examples/walk/prepare.py out/walk

The notes are the demo's, of four hospitals; the public text is the demo's textbook. Nobody in them
exists. The model is a Llama of two layers drawn at random, which the walk's first job trains.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fedward.simulations.notes import SERVICES, generate, public_corpus, vocabulary, write_folder
from fedward.tuning.small import build_llama, build_tokenizer

ASK = " Service:"


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(row: Mapping[str, str]) -> dict[str, str]:
    """A preference: whoever names the service shall name its team."""
    service = " " + row["label"]
    return {"prompt": row["text"] + ASK, "chosen": service + " team", "rejected": service}


def main(folder: Path) -> None:
    """Write everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(generate(0), folder / "notes")
    corpus = public_corpus(0, 6900)
    learn, prefer = corpus[:6000], corpus[6000:]
    texts = ({"prompt": row["text"] + ASK, "completion": " " + row["label"]} for row in learn)
    write(folder / "public.jsonl", texts)
    pairs = [pair(row) for row in prefer]
    write(folder / "pairs.jsonl", pairs[:700])
    write(folder / "pairs-held-out.jsonl", pairs[700:])
    tokenizer = build_tokenizer([*vocabulary(), *SERVICES, ASK, "team"], 1536)
    tokenizer.chat_template = None  # notes are no talk
    build_llama(folder / "start", tokenizer, hidden=64, layers=2, heads=4, max_length=128)
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)  # transformers' start suits widths of thousands
    model.save_pretrained(folder / "start")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
