"""One private, secure round of an 8 B-shaped model on one GPU: speed, memory, what privacy costs.

A Llama of 3.1 8B's shape with random weights, its base in NF4, LoRA r = 16 on every linear layer.
Three sites train in turn on the one device, each with its own key, policy and ledger, under DP;
then their updates go through a whole session of secure aggregation. Everything is the product's own
code, as ``fedward simulate`` runs it; only the notes are random, and all of the same length.

After the round, steps with privacy (Fedward's) and without (plain torch) take turns on the same
model and records, for what privacy costs in time and memory.

    make gpu-test                                    # needs a CUDA device and 40 GB of disk
    python benchmarks/gpu_round.py --quick           # toy size on the CPU, as in CI

The last line is JSON. Peak memory is the CUDA allocator's; on a CPU, the resident high-water mark
of the process, all of it.
"""

import fedward  # noqa: F401  # switches telemetry off before any library loads

# isort: split

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from reporting import machine
from stepping.memory import peak
from stepping.models import SIZES, Losses, Size
from stepping.ways import plain
from transformers import LlamaConfig, LlamaForCausalLM

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.trainer import LocalTrainer, mechanism, train_model
from fedward.client.training import Scores, TrainRequest, TrainResult
from fedward.plan import Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.noise import SecureStream
from fedward.server.store import Phase
from fedward.simulations.federation import Federation
from fedward.tuning.models import fingerprint
from fedward.tuning.objectives import encode
from fedward.tuning.records import Records, group
from fedward.tuning.small import build_tokenizer
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import dimension

SITES = ("northgate", "harbour", "valley")
TOY = Size(
    hidden=64, layers=2, heads=4, vocabulary=300, length=32, batch=4, rank=16, quantize="nf4"
)
Report = dict[str, Any]


class Timed:
    """A site's trainer with a stop-watch around its training.

    Args:
        trainer: The real one.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer, self.seconds = trainer, 0.0

    def prepare(self, request: TrainRequest) -> None:
        """The real one's."""
        self._trainer.prepare(request)

    def train(self, request: TrainRequest) -> TrainResult:
        """The real one's, timed."""
        start = time.perf_counter()
        result = self._trainer.train(request)  # its update is on the CPU: all work is done
        self.seconds = time.perf_counter() - start
        return result

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        """The real one's."""
        return self._trainer.evaluate(plan, adapter, run)


def make_base(folder: Path, size: Size, device: str) -> Path:
    """Save a Llama with random bfloat16 weights, as a real one lies on disk."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner or 2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups or size.heads,
        max_position_embeddings=size.length,
    )
    tokenizer = build_tokenizer(["patient note"], 300)
    config.update(
        {
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
    )
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    return folder


def make_plan(base: Path, size: Size, steps: int) -> Plan:
    """One round in which every patient is drawn at every step, so that the tokens are known."""
    return Plan(
        name="gpu-test",
        model=Model(
            path=str(base),
            sha256=fingerprint(base),
            quantize="nf4",
            gradient_checkpointing=size is SIZES["8b"],
        ),
        tuner=Tuner(
            arguments={
                "r": size.rank, "lora_alpha": 2 * size.rank, "target_modules": "all-linear"
            }
        ),
        task=Task(objective="sft", max_length=size.length),
        data=Data(unit="patient"),
        rounds=Rounds(
            count=1,
            spare=0,
            steps=steps,
            sampling_rate=1.0,
            normaliser=float(size.batch),
            learning_rate=1e-4,
            physical_batch=size.batch,
            deadline="60m",
        ),
        cohort=Cohort(minimum=len(SITES), colluders=1),
        aggregation=Aggregation(scheme="fedavg", update_clip=1.0),
        privacy=Privacy(epsilon=8.0, delta=1e-5, clip=1.0, records_per_unit=1),
    )  # fmt: skip


def notes(site: int, size: Size) -> Records:
    """A batch of notes that are longer than a record may be, each of another patient."""
    draw = torch.Generator().manual_seed(site)
    rows = []
    for patient in range(size.batch):
        letters = torch.randint(97, 123, (2 * size.length,), generator=draw)
        rows.append({"text": "".join(map(chr, letters.tolist())), "patient": f"{site}-{patient}"})
    return group(rows, "patient")


def federate(folder: Path, plan: Plan, size: Size, device: str) -> tuple[Report, float]:
    """The round; tokens per second of each site, seconds of all, epsilon; and memory in GB."""
    tuned = tuned_model(plan, device)
    trainers = {
        name: Timed(LocalTrainer(notes(number, size), device=device, physical_batch=size.batch))
        for number, name in enumerate(SITES)
    }
    federation = Federation(
        folder=folder, plan=plan, start=tuned.start, layout=tuned.layout, trainers=trainers
    )
    cohort = list[Any]()

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        print(f"  {phase.value}{'' if site < 0 else f' ({SITES[site]})'}", flush=True)
        if phase is Phase.COMMITTED and isinstance(facts, dict):
            members = facts["cohort"]
            cohort.extend(members if isinstance(members, list) else [])

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    adapter = federation.run(observe)
    seconds = time.perf_counter() - start
    tokens = plan.rounds.steps * size.batch * size.length
    report = {
        "parameters": dimension(tuned.layout),
        "round_seconds": seconds,
        "training_seconds": {name: trainers[name].seconds for name in federation.names},
        "tokens_per_second": tokens
        / statistics.median(trainer.seconds for trainer in trainers.values()),
        "cohort": [federation.names[site] for site in cohort],
        "moved": adapter != tuned.start,
        "epsilon_spent": {name: federation.epsilon_spent(name) for name in federation.names},
    }
    return report, peak_memory(device)


def peak_memory(device: str) -> float:
    """GB: what the CUDA allocator held at most, or the process had in memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def compare(plan: Plan, size: Size, device: str, turns: int) -> Report:
    """Time and memory of a private step over a plain one's, on the same model."""
    tuned = tuned_model(plan, device)
    records = notes(0, size)
    encoded = encode(records, tuned.tokenizer, plan)
    stream = SecureStream()
    step = plain(tuned.model, Losses(encoded, device), size.batch)

    def without() -> None:
        tuned.model.train()
        step()

    def private() -> None:
        train_model(
            tuned.model, records.units, encoded, plan, mechanism(plan), steps=1, stream=stream,
            physical_batch=size.batch,
        )  # fmt: skip

    ways: Sequence[Callable[[], None]] = (without, private)
    for way in ways:
        way()
    times = [[timed(way, device) for way in ways] for _ in range(turns)]
    ratios = [private_ / plain_ for plain_, private_ in times]
    held = [peak(way, device) for way in ways]
    return {
        "plain_seconds": statistics.median(pair[0] for pair in times),
        "dp_seconds": statistics.median(pair[1] for pair in times),
        "dp_over_plain": {
            "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)
        },
        "dp_over_plain_memory": held[1] / held[0],
    }  # fmt: skip


def timed(step: Callable[[], None], device: str) -> float:
    """Wall seconds of one step."""
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: Size, device: str, *, steps: int, turns: int) -> Report:
    """Everything at one size."""
    with tempfile.TemporaryDirectory(prefix="gpu-round-") as folder:
        root = Path(folder)
        start = time.perf_counter()
        plan = make_plan(make_base(root / "base", size, device), size, steps)
        if device != "cpu":
            torch.cuda.empty_cache()
        tuned_model(plan, device)
        print(f"base made and loaded in {time.perf_counter() - start:.0f} s", flush=True)
        found, gigabytes = federate(root / "federation", plan, size, device)
        return {
            "size": dataclasses.asdict(size),
            "steps": steps,
            **found,
            "peak_gb": gigabytes,
            **compare(plan, size, device, turns),
        }


def main(arguments: Sequence[str] | None = None) -> Report:
    """Read the options, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy size on the CPU")
    parser.add_argument("--steps", type=int, default=None, help="steps of the round")
    parser.add_argument("--turns", type=int, default=None, help="of the comparison")
    options = parser.parse_args(arguments)
    device, size = ("cpu", TOY) if options.quick else ("cuda", SIZES["8b"])
    if not options.quick and not torch.cuda.is_available():
        parser.error("no CUDA device here: --quick runs the toy size on the CPU")
    name = device if device == "cpu" else torch.cuda.get_device_name()
    load = f"{os.getloadavg()[0]:.1f}"
    facts = {
        **machine("torch", "peft", "transformers", "bitsandbytes"),
        "device": name,
        "load": load,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        found = measure(
            size,
            device,
            steps=options.steps or (2 if options.quick else 8),
            turns=options.turns or (3 if options.quick else 8),
        )
    print(
        f"{found['parameters']:,} parameters trained, {found['tokens_per_second']:.0f} tokens/s a "
        f"site, round {found['round_seconds']:.1f} s, peak {found['peak_gb']:.2f} GB, DP / plain "
        f"{found['dp_over_plain']['median']:.3f} in time, {found['dp_over_plain_memory']:.3f} in "
        "memory"
    )
    report = {"machine": facts, **found}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
