"""Every tuner in every stage: it moves in float32, is the same when reloaded, and resumes exactly.

The default suite takes a sample of the grid; the slow test takes all of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedward.errors import ConfigurationError
from fedward.server.central import stages
from fedward.server.central.checkpoints import training_state
from fedward.server.central.job import REWARDED, STAGES, Reward
from fedward.server.central.loading import open_trained
from fedward.server.central.running import save_trained
from fedward.server.central.stages import build, kind_of
from fedward.server.central.validity import BASES, refusal
from fedward.tuning.methods import METHODS
from fedward.tuning.models import fingerprint
from fedward.tuning.small import build_bert, build_tokenizer
from fedward.tuning.tuners import trainable
from tests.server.central.rig import WORDS, build_base, build_experts, make_step

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
    """A dense model, a mixture of experts, and an encoder."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = build_tokenizer([f"sign {word} is {word} none" for word in WORDS] * 4, 300)
    return {
        "dense": build_base(folder / "dense"),
        "experts": build_experts(folder / "experts"),
        "encoder": build_bert(folder / "encoder", tokenizer, layers=1, heads=2, max_length=64),
    }


def fit(bases: Mapping[str, Path], stage: str, method: str) -> Path:
    """A base that the cell can be trained over."""
    if METHODS[method].part is not None:
        return bases["experts"]
    behind = stage in {"classify", "reward"} and method in {"prompt", "p-tuning"}
    return bases["encoder" if behind else "dense"]


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
    check_cell(fit(bases, stage, method), tmp_path, stage, method, quantize)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method", "quantize"), GRID)
def test_every_cell_of_the_grid(bases, tmp_path, stage, method, quantize):
    check_cell(fit(bases, stage, method), tmp_path, stage, method, quantize)


@pytest.mark.parametrize("stage", ["classify", "reward"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_a_decoder_does_not_judge_behind_vectors(bases, tmp_path, stage, method):
    step = make_step(bases["dense"], tmp_path, stage, method)
    with pytest.raises(ConfigurationError, match="needs an encoder"):
        build(step, bases["dense"], tmp_path / "checkpoints")


@pytest.mark.parametrize("method", ["p-tuning", "prefix"])
def test_what_judges_is_the_same_behind_padding(bases, tmp_path, monkeypatch, method):
    """Why: the control is the decoder's own reward under the method that is refused."""
    monkeypatch.setattr(stages, "check_last_token", lambda *_: None)
    step = make_step(bases["dense"], tmp_path, "reward", method)
    model = build(step, bases["dense"], tmp_path / "checkpoints").model.eval()
    ids, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(input_ids=padded, attention_mask=(padded > 0).long()).logits
    near = torch.allclose(alone, beside, atol=1e-5)
    assert near == (method == "prefix")
