"""What the tests of central training share: a tiny Llama, rows for every stage, and jobs."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedward.plan import Model
from fedward.server.central.job import Data, Job, Merge, Reward, Step, Train, Tuner
from fedward.server.central.running import run_job
from fedward.tuning.small import build_llama, build_tokenizer

WORDS = ("cough", "fever", "rash", "pain")
ROWS: Mapping[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"sign {w}", "completion": f" is {w}"} for w in WORDS],
    "classify": [{"text": f"sign {w}", "label": w} for w in WORDS],
    "reward": [{"prompt": f"sign {w}", "chosen": f" {w}", "rejected": " none"} for w in WORDS],
    "kto": [
        {"prompt": f"sign {w}", "completion": f" {a}", "label": a == w}
        for w in WORDS
        for a in (w, "none")
    ],
    "grpo": [{"prompt": f"sign {w}", "word": w} for w in WORDS],
}
ROWS = {
    **ROWS,
    "dpo": ROWS["reward"],
    "orpo": ROWS["reward"],
    "rloo": ROWS["grpo"],
    "ppo": ROWS["grpo"],
    "distill": [{"prompt": row["prompt"]} for row in ROWS["sft"]],
}

SMALL: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "gradual": {"every": 1, "layers": 1},
    "experts": {},
    "router": {},
    "lora-experts": {"r": 4},
    "lora-router": {"r": 4},
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "rslora": {"r": 4},
    "dora": {"r": 4},
    "lora+": {"r": 4},
    "pissa": {"r": 4},
    "adalora": {"init_r": 4, "target_r": 2, "tfinal": 1},
    "ia3": {},
    "vera": {"r": 8},
    "oft": {"oft_block_size": 8},
    "bitfit": {},
    "houlsby": {"r": 4},
    "pfeiffer": {"r": 4},
    "prompt": {"num_virtual_tokens": 4},
    "prefix": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
}
"""Every tuner at a size that fits the tiny model."""


def build_base(folder: Path, *, layers: int = 1, max_length: int = 64, seed: int = 0) -> Path:
    """A Llama of one layer that NF4 can hold."""
    texts = [f"sign {word} is {word} none" for word in WORDS] * 4
    tokenizer = build_tokenizer(texts, 300)
    return build_llama(folder, tokenizer, heads=2, layers=layers, max_length=max_length, seed=seed)


def build_experts(folder: Path, *, kind: str = "mixtral", layers: int = 1) -> Path:
    """A mixture of four experts, of which two answer for a token."""
    build_base(folder, layers=layers)  # for its tokenizer
    shape: dict[str, Any] = {
        "vocab_size": json.loads((folder / "config.json").read_bytes())["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mixtral":
            MixtralForCausalLM(MixtralConfig(num_local_experts=4, **shape)).save_pretrained(folder)
            return folder
        inner: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 32}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**inner, **shape)).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_step(base: Path, folder: Path, stage: Any, method: str = "lora", **given: Any) -> Step:
    """A step of three optimizer steps over the stage's rows; every field can be replaced.

    ``train`` is added to the usual keys of ``[train]``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = write_rows(folder / f"{stage}.jsonl", ROWS[stage])
    train: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **_lengths(stage),
        **given.pop("train", {}),
    }
    quantize = given.pop("quantize", "nf4" if method == "qlora" else "none")
    fields: dict[str, Any] = {
        "name": stage,
        "stage": stage,
        "model": Model(path=str(base), quantize=quantize),
        "tuner": Tuner(method=method, arguments=SMALL[method]),
        "data": Data(train=str(path)),
        "train": Train(arguments=train),
        "teacher": str(base) if stage == "distill" else None,
        "reward": Reward(column="word") if stage in ("grpo", "rloo", "ppo") else None,
    }
    return Step(**{**fields, **given})


def _lengths(stage: str) -> dict[str, Any]:
    if stage in ("grpo", "rloo", "ppo"):
        return {"max_completion_length": 4, "num_generations": 2}
    if stage == "distill":
        return {"max_completion_length": 4}
    return {"max_length": 32}


def run(*steps: Step | Merge, out: Path, resume: bool = False) -> list[dict[str, Any]]:
    """Run a job of these steps and merges without showing anything."""
    trained = tuple(step for step in steps if isinstance(step, Step))
    merges = tuple(step for step in steps if isinstance(step, Merge))
    console = Console(file=io.StringIO())
    return run_job(Job(name="job", steps=trained, merges=merges), out, console, resume=resume)
