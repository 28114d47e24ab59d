"""Steps that several processes share, over gloo: the same as one process takes."""

import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from fedward.errors import ModelError, UncoveredParameters
from fedward.privacy.coverage import coverage
from fedward.privacy.noise import SecureStream
from fedward.privacy.ranks import Ranks
from fedward.privacy.training import train_steps
from tests.privacy import tiny

UNITS = [*tiny.UNITS, [9]]
LATER = tiny.mechanism(sampling_rate=0.5, noise_multiplier=0.7, normaliser=3.0)


def trained(model: Any, ranks: Ranks | None, key: bytes = tiny.KEY) -> dict[str, Tensor]:
    """The trainable parameters after four steps; some draw one unit or none."""
    parameters = list(tiny.trainable(model).values())
    loss = tiny.losses(tiny.records(10))
    train_steps(
        model, UNITS, loss, torch.optim.SGD(parameters, lr=0.3), LATER,
        steps=4, stream=SecureStream(key), physical_batch=3, ranks=ranks,
    )  # fmt: skip
    return {name: p.detach().clone() for name, p in tiny.trainable(model).items()}


def sharded(model: Any) -> Any:
    """The model with its frozen weights sharded over all processes, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = set(tiny.trainable(model).values())
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def whole_models(rank: int) -> None:
    expected = trained(tiny.lora(tiny.causal("Llama")), None)
    model = tiny.lora(tiny.causal("Llama"))
    if rank > 0:  # starts are the first process's
        for parameter in tiny.trainable(model).values():
            parameter.data.add_(1.0)
    found = trained(model, Ranks())
    assert tiny.distance(expected, found) < 1e-6
    # Negative control: processes that do not add up are noticed.
    assert tiny.distance(expected, trained(tiny.lora(tiny.causal("Llama")), Alone())) > 1e-3


class Alone(Ranks):
    def add_up(self, totals: Any) -> None:
        pass


def sharded_models(rank: int) -> None:
    for how in ("none", "reentrant", "non-reentrant"):
        expected = trained(tiny.checkpointed(tiny.lora(tiny.causal("Llama")), how), None)
        model = sharded(tiny.checkpointed(tiny.lora(tiny.causal("Llama")), how))
        assert tiny.distance(expected, trained(model, Ranks())) < 1e-6
    model = tiny.lora(tiny.causal("Llama"))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(UncoveredParameters, match="shard the frozen weights only"):
        coverage(model)


def different_keys(rank: int) -> None:
    with pytest.raises(ModelError, match="different streams"):
        trained(tiny.lora(tiny.causal("Llama")), Ranks(), key=bytes([rank]) * 32)


def _process(rank: int, work: Callable[[int], None], folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = FileStore(str(folder / "store"), 2)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    try:
        work(rank)
    except AssertionError:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("work", [whole_models, sharded_models, different_keys])
def test_two_processes_take_the_step_of_one(work, tmp_path):
    spawn(_process, (work, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]  # torch


def test_a_single_process_group_changes_nothing(tmp_path):
    dist.init_process_group(
        "gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        found = trained(tiny.lora(tiny.causal("Llama")), Ranks())
    finally:
        dist.destroy_process_group()
    expected = trained(tiny.lora(tiny.causal("Llama")), None)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
