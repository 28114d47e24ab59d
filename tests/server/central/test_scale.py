"""Several processes: the same losses as one; the configurations that are shipped can be read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from tests.server.central.rig import ROWS, build_base, write_rows

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "examples" / "central" / "scale").glob("*.yaml"))
SHARDING = {"fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED"}


def losses(
    folder: Path, name: str, rows: int, *launch: str, tuner: str = "lora", save: str = "no"
) -> list[float]:
    """Train six steps of four rows by a command of its own; ``rows`` in each process."""
    base = build_base(folder / "base", layers=2)
    data = write_rows(folder / "rows.jsonl", ROWS["sft"] * 3)
    job = folder / f"{name}.toml"
    job.write_text(
        f'name = "{name}"\nstage = "sft"\nmodel = {{ path = "{base}" }}\n'
        f'tuner = {{ method = "{tuner}" }}\ndata = {{ train = "{data}" }}\n'
        f"[train]\nmax_steps = 6\nper_device_train_batch_size = {rows}\nlearning_rate = 1e-2\n"
        f'logging_steps = 1\nmax_length = 32\nsave_strategy = "{save}"\n'
    )
    command = [sys.executable, *launch, "train", str(job), "--out", str(folder / name)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (folder / name / name / "log.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, log) if "loss" in line]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_two_processes_give_the_losses_of_one(tmp_path, tuner):
    one = losses(tmp_path, "one", 4, "-m", "fedward", tuner=tuner)
    two = losses(tmp_path, "two", 2, *TORCHRUN, "-m", "fedward", tuner=tuner)
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-4)
    # Negative control: two processes that each took the whole batch would be somewhere else.
    assert losses(tmp_path, "half", 2, "-m", "fedward", tuner=tuner) != pytest.approx(one, abs=1e-2)


def weights(folder: Path, name: str) -> dict[str, Any]:
    (path,) = (folder / name / name / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_model_in_pieces_is_trained_and_saved_as_a_whole_one(tmp_path, tuner):
    """The shipped FSDP2 configuration over two processes; its pieces are accelerate's and torch's.

    In float32, because bfloat16 on a CPU says nothing of that on a GPU.
    """
    fsdp2 = ROOT / "examples" / "central" / "scale" / "fsdp2.yaml"
    options = ["--config_file", str(fsdp2), "--num_processes", "2", "--mixed_precision", "no"]
    opened = str(Path(__file__).with_name("sharded.py"))
    launch = ["-m", "accelerate.commands.launch", *options, opened]
    one = losses(tmp_path, "one", 4, "-m", "fedward", tuner=tuner)
    two = losses(tmp_path, "two", 2, *launch, tuner=tuner, save="steps")
    assert two == pytest.approx(one, abs=1e-4)
    whole, gathered = weights(tmp_path, "one"), weights(tmp_path, "two")
    assert whole.keys() == gathered.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(gathered[name], tensor, atol=1e-4, rtol=0)
    # accelerate writes it where it has sharded, and nowhere else
    assert (tmp_path / "two" / "two" / "checkpoints/checkpoint-6/pytorch_model_fsdp.bin").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_is_a_configuration_of_accelerate(path):
    config: Any = load_config_from_file(str(path))
    assert str(config.distributed_type).endswith(SHARDING[path.stem])
    command = re.search(r"#     (accelerate launch .*)", path.read_text())
    assert command is not None
    assert str(path.relative_to(ROOT)) in command[1]
    assert command[1] in (ROOT / "docs" / "central-training.md").read_text()
