"""Every tuner in every stage: it moves in float32, is the same when reloaded, and resumes exactly.

The default suite takes a sample of the grid; the slow test takes all of it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedward.server.central.checkpoints import training_state
from fedward.server.central.job import REWARDED, STAGES, Reward
from fedward.server.central.loading import open_trained
from fedward.server.central.running import save_trained
from fedward.server.central.stages import build, kind_of
from fedward.server.central.validity import BASES, refusal
from fedward.tuning.methods import METHODS
from fedward.tuning.models import fingerprint
from fedward.tuning.tuners import trainable
from tests.server.central.rig import build_base, build_experts, make_step

SAMPLE = [
    ("sft", "lora", "none"),
    ("sft", "full", "none"),
    ("classify", "full", "none"),
    ("classify", "lora", "nf4"),
    ("reward", "p-tuning", "none"),
    ("dpo", "dora", "nf4"),
    ("kto", "adalora", "none"),
    ("orpo", "houlsby", "nf4"),
    ("ppo", "lora", "none"),
    ("distill", "lora", "none"),  # a step an epoch, as in no other
    ("dpo", "gradual", "none"),
    ("sft", "router", "none"),
    ("kto", "lora-experts", "none"),
]
GRID = [
    (stage, method, base)
    for stage in STAGES
    for method in METHODS
    for base in BASES
    if refusal(stage, method, base) is None
]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A dense model, and a mixture of experts."""
    folder = tmp_path_factory.mktemp("bases")
    return build_base(folder / "dense"), build_experts(folder / "experts")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    was = model.training
    given = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    model.train(was)
    assert isinstance(given, Tensor)
    return given


def states(trainer: Any) -> dict[str, Tensor]:
    """All that is trained, critic and memories included."""
    trained = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    return trained | {name: tensor.clone() for name, tensor in training_state(trainer).items()}


def check_cell(base: Path, folder: Path, stage: str, method: str, quantize: str) -> None:
    """Train four steps; save, reload; go on from the second step in a new trainer."""
    train = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    given: dict[str, Any] = {"quantize": quantize, "train": train}
    if stage in REWARDED:
        given["reward"] = Reward(pattern="[a-z]")  # found in about every other completion
    step = make_step(base, folder, stage, method, **given)
    teacher = build_base(folder / "teacher", seed=1) if stage == "distill" else None

    def new() -> Any:
        return build(step, base, folder / "checkpoints", teacher=teacher)

    trainer = new()
    before = states(trainer)
    assert all(p.dtype == torch.float32 for p in trainable(trainer.model).values())
    trainer.train()
    after = states(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Without the wrapper that computes in bfloat16.
    expected = logits(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    save_trained(trainer, step, base, fingerprint(base), folder / "model", {})
    assert not (folder / "model" / "training_args.bin").exists()
    reloaded, _, kind = open_trained(folder / "model")
    assert kind == kind_of(step)
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)

    resumed = new()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    again = states(resumed)
    assert again.keys() == after.keys()
    assert not [name for name in after if not torch.equal(after[name], again[name])]


@pytest.mark.parametrize(("stage", "method", "quantize"), SAMPLE)
def test_a_cell_of_the_grid(bases, tmp_path, stage, method, quantize):
    check_cell(bases[METHODS[method].part is not None], tmp_path, stage, method, quantize)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method", "quantize"), GRID)
def test_every_cell_of_the_grid(bases, tmp_path, stage, method, quantize):
    check_cell(bases[METHODS[method].part is not None], tmp_path, stage, method, quantize)
