"""A checkpoint that holds code is refused, and the code does not run."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedward.errors import ConfigurationError
from fedward.server.central.job import Job, Step
from fedward.server.central.running import run_job
from tests.server.central.rig import build_base, make_step, run


class Planted:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module", params=["lora", "full"])
def interrupted(request, tmp_path_factory):
    """A job with a checkpoint to go on from."""
    folder = tmp_path_factory.mktemp("done")
    base = build_base(folder / "base")
    step = make_step(base, folder, "sft", request.param, train={"max_steps": 2, "save_steps": 1})
    run(step, out=folder / "out")
    shutil.rmtree(folder / "out" / "sft" / "model")
    (folder / "out" / "sft" / "report.json").unlink()
    shutil.rmtree(folder / "out" / "sft" / "checkpoints" / "checkpoint-2")
    return step, folder / "out"


def planted(interrupted: tuple[Step, Path], folder: Path, name: str) -> tuple[Step, Path, Path]:
    step, before = interrupted
    out, marker = folder / "out", folder / "it ran"
    shutil.copytree(before, out)
    checkpoint = out / "sft" / "checkpoints" / "checkpoint-1"
    assert name == "pytorch_model.bin" or (checkpoint / name).exists()
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Planted(marker)}, checkpoint / name)
    return step, out, marker


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_refused(interrupted, tmp_path, name):
    step, out, marker = planted(interrupted, tmp_path, name)
    with pytest.raises(ConfigurationError, match="tensors alone"):
        run(step, out=out, resume=True)
    assert not marker.exists()
    # The control: the file does what it is said to do.
    torch.load(out / "sft" / "checkpoints" / "checkpoint-1" / name, weights_only=False)
    assert marker.exists()


def test_weights_that_are_no_safetensors_are_read_as_tensors_alone(interrupted, tmp_path):
    if interrupted[0].tuner.method != "full":
        pytest.skip("an adapter's checkpoint is read as safetensors only")
    step, out, marker = planted(interrupted, tmp_path, "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="tensors alone"):
        run(step, out=out, resume=True)
    assert not marker.exists()


def test_other_files_of_a_checkpoint_are_not_read(interrupted, tmp_path):
    """transformers writes its arguments as a pickle, which nobody opens."""
    step, out, marker = planted(interrupted, tmp_path, "training_args.bin")
    run_job(Job(name="job", steps=(step,)), out, Console(file=io.StringIO()), resume=True)
    assert not marker.exists()
    assert json.loads((out / "sft" / "report.json").read_text())["steps"] == 2
