"""Train the small causal language model that the text benchmarks fine-tune.

An about 8-million-parameter Llama with a byte-level BPE of 8,192 tokens reads general and medical
English that the medquad benchmark does not use. Nothing private: all parameters are trained by
`fedward.server.central.full`. Interrupted, the same command goes on from the last checkpoint.

    python benchmarks/base_lm.py                 # out/base-lm, at most 30 minutes on 2 cores
    python benchmarks/base_lm.py --quick --json  # a toy in out/base-lm-quick, under 2 minutes
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fedward.errors import ConfigurationError, FedwardError
from fedward.server.central.full import FullTraining, train_full
from fedward.tuning.small import build_llama, build_tokenizer

CORPUS: Mapping[str, tuple[str, ...]] = {
    "med_abstracts": ("text",),
    "pubmedqa": ("question", "context", "long_answer"),
    "mts_dialog": ("dialogue", "note"),
    "dolly_fedit": ("instruction", "context", "response"),
    "e2e_nlg": ("input", "text"),
}
"""Data set to the columns that make one document."""

HELD_OUT = 50
"""Every so many-th block is never trained on."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the model and its training are.

    Args:
        vocabulary: Tokens of the tokenizer.
        hidden: Width of the model.
        layers: Its transformer blocks.
        block: Tokens of one training example.
        characters: Most characters taken of one data set.
        training: The optimizer's side.
    """

    vocabulary: int
    hidden: int
    layers: int
    block: int
    characters: int
    training: FullTraining


FULL = Size(
    vocabulary=8192,
    hidden=256,
    layers=6,
    block=128,
    characters=4_000_000,
    training=FullTraining(
        steps=300, batch_size=16, learning_rate=1.5e-3, weight_decay=0.05, save_every=50
    ),
)
QUICK = Size(
    vocabulary=1024,
    hidden=64,
    layers=2,
    block=64,
    characters=100_000,
    training=FullTraining(steps=100, batch_size=16, learning_rate=5e-3, save_every=25),
)


def documents(folder: Path, columns: Sequence[str], most: int) -> list[str]:
    """The training documents of one data set, up to so many characters.

    Args:
        folder: Holds ``train.jsonl`` or ``train.jsonl.gz``.
        columns: Joined by line ends into one document.
        most: Characters to stop after.

    Raises:
        ConfigurationError: There is no such file.
    """
    path = next((p for p in sorted(folder.glob("train.jsonl*"))), None)
    if path is None:
        raise ConfigurationError(
            f"{folder}: no train.jsonl or train.jsonl.gz; name the data's folder with --data"
        )
    texts, taken = list[str](), 0
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = "\n".join(row[column] for column in columns if row.get(column))
            texts.append(text)
            taken += len(text)
            if taken >= most:
                break
    return texts


def blocks_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, block: int) -> Tensor:
    """All documents, each ended by the end token, cut into ``(blocks, block)`` token numbers."""
    stream = list[int]()
    for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    whole = len(stream) // block * block
    return torch.tensor(stream[:whole]).view(-1, block)


def next_token_loss(blocks: Tensor) -> Callable[[nn.Module, Sequence[int]], Tensor]:
    """The mean loss over the tokens of each block with these numbers, shape ``(B,)``."""

    def loss(model: nn.Module, indices: Sequence[int]) -> Tensor:
        ids = blocks[torch.tensor(indices)]
        logits = model(input_ids=ids).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.mean(dim=1)

    return loss


def mean_loss(model: nn.Module, blocks: Tensor) -> float:
    """Nats per token over all blocks."""
    loss, model = next_token_loss(blocks), model.eval()
    with torch.no_grad():
        parts = [
            loss(model, range(start, min(start + 16, len(blocks))))
            for start in range(0, len(blocks), 16)
        ]
    return float(torch.cat(parts).mean())


def train(data: Path, out: Path, size: Size, console: Console) -> dict[str, Any]:
    """Build tokenizer and model, train, save, and return the facts."""
    started, work = time.monotonic(), out.with_name(out.name + "-training")
    texts = [
        text
        for name, columns in CORPUS.items()
        for text in documents(data / name, columns, size.characters)
    ]
    console.print(f"{len(texts):,} documents; building the tokenizer")
    tokenizer = build_tokenizer(texts, size.vocabulary)
    blocks = blocks_of(texts, tokenizer, size.block)
    held_out = torch.arange(len(blocks)) % HELD_OUT == 0
    build_llama(
        work / "start",
        tokenizer,
        hidden=size.hidden,
        layers=size.layers,
        heads=size.hidden // 32,
        max_length=512,
    )
    model = AutoModelForCausalLM.from_pretrained(work / "start", dtype=torch.float32)
    before = mean_loss(model, blocks[held_out])
    losses = _train_with_progress(model, blocks[~held_out], size, work, console)
    after = mean_loss(model, blocks[held_out])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (work / "checkpoint.safetensors").unlink()
    return {
        "folder": str(out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": {
            "corpus": blocks.numel(),
            "trained": losses.size * blocks[0].numel() * size.training.batch_size,
        },
        "held_out_loss": {"before": before, "after": after, "words_alone": _unigram(blocks)},
        "seconds": round(time.monotonic() - started, 1),
        "size": asdict(size),
    }


def _train_with_progress(
    model: nn.Module, blocks: Tensor, size: Size, work: Path, console: Console
) -> "np.ndarray[Any, np.dtype[np.float64]]":
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=size.training.steps, loss=math.nan)
        losses = train_full(
            model,
            len(blocks),
            next_token_loss(blocks),
            size.training,
            checkpoint=work / "checkpoint.safetensors",
            on_step=lambda done, loss: progress.update(bar, completed=done, loss=loss),
        )
    return np.array(losses)


def _unigram(blocks: Tensor) -> float:
    """Nats per token of the best model that ignores context."""
    counts = torch.bincount(blocks.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def main() -> None:
    """Read the options, train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="data sets")
    parser.add_argument("--out", type=Path, help="the model's folder (default: out/base-lm)")
    parser.add_argument("--quick", action="store_true", help="a toy model, under 2 minutes")
    parser.add_argument("--json", action="store_true", help="print only the facts, as JSON")
    options = parser.parse_args()
    console = Console(stderr=options.json)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers left it bare
    out: Path = options.out or Path("out/base-lm-quick" if options.quick else "out/base-lm")
    done = out.with_name(out.name + "-training") / "report.json"
    if done.exists() and (out / "config.json").exists():
        console.print(f"{out} is trained already; remove {done} to train it anew")
        facts = json.loads(done.read_text())
    else:
        try:
            facts = train(options.data, out, QUICK if options.quick else FULL, console)
        except FedwardError as error:
            parser.exit(2, f"error: {error}\n")
        done.write_text(json.dumps(facts, indent=2) + "\n")
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        loss = facts["held_out_loss"]
        console.print(
            f"{facts['parameters']:,} parameters in {facts['folder']}: held-out loss "
            f"{loss['before']:.3f} → {loss['after']:.3f} nats a token "
            f"(words alone: {loss['words_alone']:.3f}), {facts['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
