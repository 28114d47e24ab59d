"""Keeping what a model knew: two tasks in a row, with and without each means against forgetting."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from fedward.errors import ConfigurationError, DataError
from fedward.plan import Model
from fedward.server.central.job import Data, Keep, Step, Stop, Tuner
from fedward.server.central.keeping import importance, mix
from fedward.server.central.stages import build
from fedward.tuning.tuners import trainable
from tests.server.central.rig import ROWS, WORDS, build_base, make_step, run, write_rows

OLD = ROWS["sft"]
NEW = [
    {"prompt": f"{word} none", "completion": f" {other}"}
    for word, other in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
]
FULL = Tuner(method="full")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A model that knows the old task, whose rows are beside it."""
    folder = tmp_path_factory.mktemp("knowing")
    step = make_step(
        build_base(folder / "base"),
        folder,
        "sft",
        "full",
        train={"max_steps": 80, "learning_rate": 3e-3},
    )
    run(step, out=folder / "out")
    return folder / "out" / "sft" / "model", write_rows(folder / "old.jsonl", OLD)


def learn(knowing: Any, folder: Path, *, steps: int = 40, **keep: Any) -> Step:
    """Teach the new task to the model that knows the old one."""
    model, old = knowing
    folder.mkdir(exist_ok=True)
    return make_step(
        model,
        folder,
        "sft",
        "full",
        data=Data(train=str(write_rows(folder / "new.jsonl", NEW))),
        keep=Keep(data=str(old), evaluation=str(old), **keep),
        train={
            "max_steps": steps,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
        },
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}


def risen(report: Any) -> float:
    """By how much the loss on the old task rose."""
    return float(report["kept"]["after"]["loss"] - report["kept"]["before"]["loss"])


@pytest.fixture(scope="module")
def forgot(knowing, tmp_path_factory):
    """How much is forgotten when nothing is done against it."""
    folder = tmp_path_factory.mktemp("forgot")
    (report,) = run(learn(knowing, folder), out=folder / "out")
    return report


def test_without_any_means_it_forgets(forgot):
    assert forgot["kept"]["before"]["loss"] < 0.1
    assert risen(forgot) > 1
    assert forgot["kept"]["after"].keys() >= {"loss", "mean_token_accuracy"}
    assert "runtime" not in forgot["kept"]["after"]


@pytest.mark.parametrize(
    "keep", [{"replay": 0.3}, {"l2_sp": 0.3}, {"ewc": 3.0}], ids=["replay", "l2_sp", "ewc"]
)
def test_each_means_forgets_less_and_learns(knowing, forgot, tmp_path, keep):
    (report,) = run(learn(knowing, tmp_path, **keep), out=tmp_path / "out")
    assert risen(report) < 0.6 * risen(forgot)
    log = [json.loads(x) for x in (tmp_path / "out/sft/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.05 * losses[0]
    assert not [line for line in log if "eval_loss" in line]  # a report, not an evaluation


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_is_resumed_exactly(knowing, tmp_path, method):
    step = learn(knowing, tmp_path, replay=0.3, l2_sp=1.0, ewc=1.0)
    step = make_step(
        Path(step.model.path),
        tmp_path,
        "sft",
        method,
        data=step.data,
        keep=step.keep,
        train={"max_steps": 6, "save_steps": 3},
    )

    def new() -> Any:
        return build(step, Path(step.model.path), tmp_path / "checkpoints")

    whole, resumed = new(), new()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-3"))
    expected, found = trainable(whole.model), trainable(resumed.model)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_the_pull_is_the_same_however_a_batch_is_cut(knowing, tmp_path):
    """A batch of four rows in one piece, and in two: without the division it would be doubled."""
    ends = []
    for size in (4, 2):
        step = learn(knowing, tmp_path, l2_sp=3.0)
        arguments: Any = step.train.arguments
        arguments |= {
            "max_steps": 4,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        trainer = build(step, Path(step.model.path), tmp_path / str(size))
        start = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
        trainer.train()
        moved = {name: p - start[name] for name, p in trainable(trainer.model).items()}
        ends.append(torch.cat([moved[name].flatten() for name in sorted(moved)]))
    assert ends[0].norm() > 1e-3
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[0].norm()


def test_the_pull_is_the_gradient_of_the_penalty(knowing, tmp_path):
    trainer = build(learn(knowing, tmp_path, l2_sp=0.5, ewc=2.0), knowing[0], tmp_path / "out")
    trainer.train()
    trainer.model.zero_grad()
    trainer.pulls = tuple(reversed(trainer.pulls))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, dict(batch))
    pulled = gradients(trainer.model)
    pulls, trainer.pulls = trainer.pulls, ()
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, dict(batch))
    trained, free = trainable(trainer.model), gradients(trainer.model)
    penalty = torch.stack([0.5 * (s * (p - start).square()).sum() for p, start, s in pulls]).sum()
    expected = torch.autograd.grad(penalty, list(trained.values()))
    for (name, _), wanted in zip(trained.items(), expected, strict=True):
        torch.testing.assert_close(pulled[name] - free[name], wanted, atol=1e-5, rtol=1e-3)


def test_importance_is_the_mean_squared_gradient_of_single_rows(knowing, tmp_path):
    trainer = build(learn(knowing, tmp_path, ewc=1.0), knowing[0], tmp_path / "out")
    rows = trainer.train_dataset.select(range(3))
    found = importance(trainer, rows, 2)
    model = trainer.model.eval()
    trained = trainable(model)
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in list(rows)[:2]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        for name, gradient in gradients(model).items():
            expected[name] += gradient.square()
        model.zero_grad()
    mean = torch.cat([each.flatten() for each in expected.values()]).mean()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each / mean, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in trained.values())


class TestMix:
    new = Dataset.from_dict({"n": list(range(300))})
    old = Dataset.from_dict({"n": list(range(1000, 1400))})

    def test_the_share_is_the_share_and_the_new_rows_keep_their_order(self):
        rows = mix(self.new, self.old, 0.2, 0)["n"]
        known = [n for n in rows if n >= 1000]
        assert len(known) / len(rows) == pytest.approx(0.2, abs=0.05)
        fresh = [n for n in rows if n < 1000]
        assert fresh[:300] == list(range(300))
        assert sum(a >= 1000 and b >= 1000 for a, b in pairwise(rows)) < len(known)

    def test_few_old_rows_are_used_again(self):
        rows = mix(self.new, self.old.select(range(3)), 0.2, 0)["n"]
        assert sum(n >= 1000 for n in rows) > 30

    def test_the_seed_decides(self):
        one, two, three = (mix(self.new, self.old, 0.2, seed)["n"] for seed in (0, 0, 1))
        assert one == two != three

    def test_other_columns_are_refused(self):
        with pytest.raises(DataError, match="expected rows as in"):
            mix(self.new, Dataset.from_dict({"m": [1]}), 0.2, 0)


def test_it_counts_for_nothing_when_training_stops_early(knowing, tmp_path):
    """The old task gets worse at once; that alone must not end the training."""
    step = learn(knowing, tmp_path, steps=8)
    arguments: Any = step.train.arguments
    del arguments["save_strategy"]
    step = make_step(
        knowing[0],
        tmp_path,
        "sft",
        "full",
        data=Data(train=step.data.train, evaluation=step.data.train),
        keep=step.keep,
        stop=Stop(patience=1),
        train={"max_steps": 8, "learning_rate": 1e-3},
    )
    (report,) = run(step, out=tmp_path / "out")
    assert report["steps"] == 8
    assert risen(report) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"expected replay, l2_sp, ewc or evaluation"),
        ({"replay": 0.1}, "need data"),
        ({"ewc": 0.1}, "need data"),
        ({"replay": 1.0, "data": "x"}, "0 to below 1"),
        ({"l2_sp": -1.0}, "0 or more"),
        ({"ewc": float("inf"), "data": "x"}, "0 or more"),
        ({"l2_sp": 1.0, "ewc_examples": 0}, "1 or more"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigurationError, match=said):
        Keep(**given)


def test_ewc_needs_a_likelihood(tmp_path):
    with pytest.raises(ConfigurationError, match="no likelihood"):
        make_step(tmp_path, tmp_path, "grpo", keep=Keep(ewc=0.1, data="x"))


def test_a_schedule_of_evaluations_needs_rows(knowing, tmp_path):
    step = learn(knowing, tmp_path)
    step.train.arguments["eval_strategy"] = "epoch"  # type: ignore[index]  # a dict
    with pytest.raises(ConfigurationError, match="needs \\[data\\] evaluation"):
        build(step, knowing[0], tmp_path / "out")


def test_a_base_that_is_quantised_keeps_too(knowing, tmp_path):
    step = make_step(
        knowing[0],
        tmp_path,
        "sft",
        quantize="nf4",
        data=Data(train=str(write_rows(tmp_path / "new.jsonl", NEW))),
        keep=Keep(data=str(knowing[1]), evaluation=str(knowing[1]), ewc=0.1, l2_sp=0.1, replay=0.2),
        model=Model(path=str(knowing[0]), quantize="nf4"),
    )
    (report,) = run(step, out=tmp_path / "out")
    assert risen(report) > 0
