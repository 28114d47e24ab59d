"""That training works: preferences are learned and rewards are raised, where anybody can check.

The rule: a good answer names one of three signs. The start answers with any of eight, whatever is
asked, so that it is at chance. Questions and pairs of answers that are held out are never trained.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedward.plan import Model
from fedward.server.central.job import Data, Reward, Step, Train, Tuner
from fedward.server.central.loading import open_trained
from fedward.tuning.small import build_llama, build_tokenizer
from tests.server.central.rig import run, write_rows

pytestmark = pytest.mark.slow

SIGNS = ("cough", "fever", "rash", "pain", "nausea", "itch", "chills", "swelling")
GOOD = 3
PLACES = ("ward", "clinic", "home", "street", "bath", "garden", "school", "train")


def prompts(split: str) -> list[str]:
    """Questions; held-out ones join a place and a sign that training never joins."""
    return [
        f"at the {place} after {sign} ?"
        for (i, place), (j, sign) in itertools.product(enumerate(PLACES), enumerate(SIGNS))
        if ((i + j) % 4 == 0) == (split == "test")
    ]


def pairs(split: str) -> list[dict[str, Any]]:
    """Preferences; the pairs of answers of one split are not those of the other."""
    answers = list(itertools.product(SIGNS[:GOOD], SIGNS[GOOD:]))
    own = [a for n, a in enumerate(answers) if (n % 4 == 0) == (split == "test")]
    return [
        {"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"}
        for k, prompt in enumerate(prompts(split))
        for good, bad in (own[k % len(own)], own[(k + 1) % len(own)])
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that answers with any sign."""
    folder = tmp_path_factory.mktemp("goals")
    texts = [*prompts("train"), *prompts("test")]
    tokenizer = build_tokenizer(texts * 4, 400)
    base = build_llama(folder / "base", tokenizer, heads=4, layers=2, max_length=32)
    blind = [
        {"prompt": prompt, "completion": f" {sign}"}
        for prompt in prompts("train")
        for sign in SIGNS
    ]
    step = make(folder, "sft", base, blind, [], max_steps=100, learning_rate=3e-3)
    run(step, out=folder / "start")
    return folder / "start" / "sft" / "model"


def make(folder: Path, stage: Any, base: Any, rows: Any, test: Any, **train: Any) -> Step:
    reward = train.pop("reward", None)
    data = write_rows(folder / f"{stage}-train.jsonl", rows)
    held_out = write_rows(folder / f"{stage}-test.jsonl", test) if test else None
    usual = {"per_device_train_batch_size": 16, "logging_steps": 10, "save_strategy": "no"}
    return Step(
        name=stage,
        stage=stage,
        model=Model(path=str(base)),
        data=Data(train=str(data), evaluation=str(held_out) if held_out else None),
        tuner=Tuner(method="full"),
        train=Train(arguments=usual | train),
        reward=reward,
    )


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Log likelihood of a completion."""
    ids = [tokenizer(text)["input_ids"] for text in (prompt, completion)]
    whole = torch.tensor([ids[0] + ids[1]])
    given: Tensor = model(input_ids=whole).logits[0, len(ids[0]) - 1 : -1]
    return -float(cross_entropy(given, whole[0, len(ids[0]) :], reduction="sum"))


def preferred(folder: Path) -> float:
    """Share of held-out pairs of which the model finds the better answer likelier."""
    model, tokenizer, _ = open_trained(folder)
    model.eval()
    found = [
        likelihood(model, tokenizer, row["prompt"], row["chosen"])
        > likelihood(model, tokenizer, row["prompt"], row["rejected"])
        for row in pairs("test")
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ("dpo", {"learning_rate": 1e-3, "max_steps": 60}),
        ("kto", {"learning_rate": 1e-3, "max_steps": 100}),
        ("orpo", {"learning_rate": 1e-3, "max_steps": 60, "beta": 1.0}),
    ],
)
def test_preferences_are_learned(start, tmp_path, stage, train, record_property):
    assert preferred(start) <= 0.55
    rows = pairs("train")
    if stage == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
            for row in rows
            for key in ("chosen", "rejected")
        ]
    run(make(tmp_path, stage, start, rows, [], max_length=32, **train), out=tmp_path / "out")
    found = preferred(tmp_path / "out" / stage / "model")
    record_property(stage, f"{preferred(start):.3f} to {found:.3f}")
    assert found >= 0.9


def test_a_reward_model_is_learned(start, tmp_path, record_property):
    step = make(
        tmp_path, "reward", start, pairs("train"), pairs("test"), learning_rate=1e-3, max_steps=60
    )
    (report,) = run(step, out=tmp_path / "out")
    found = report["evaluation"]["eval_accuracy"]
    record_property("reward", f"{found:.3f}")
    assert found >= 0.95


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        ("grpo", {"learning_rate": 1e-3}),
        ("rloo", {"learning_rate": 1e-3}),
        ("ppo", {"learning_rate": 1e-3, "critic_learning_rate": 1e-3}),
    ],
)
def test_a_reward_is_raised(start, tmp_path, stage, train, record_property):
    rows = [{"prompt": prompt} for prompt in prompts("train")]
    step = make(
        tmp_path,
        stage,
        start,
        rows,
        [],
        reward=Reward(pattern="|".join(SIGNS[:GOOD])),
        max_completion_length=3,
        num_generations=8,
        max_steps=60,
        beta=0.001,
        logging_steps=2,
        per_device_train_batch_size=64,
        **train,
    )
    run(step, out=tmp_path / "out")
    log = (tmp_path / "out" / stage / "log.jsonl").read_text().splitlines()

    rewards = [line["reward"] for line in map(json.loads, log) if "reward" in line]
    record_property(stage, f"{rewards[0]:.3f} to {rewards[-1]:.3f}")
    assert rewards[0] <= 0.5
    assert rewards[-1] >= 0.9
