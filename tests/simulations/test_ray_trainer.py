"""Spread over processes the very same adapter comes out, and the very same errors."""

import dataclasses
import sys
from pathlib import Path

import pytest

from fedward.attempt import Attempt
from fedward.client.training import TrainRequest
from fedward.errors import (
    ConfigurationError,
    DataError,
    InvalidValue,
    ModelError,
    PolicyRefusal,
)
from fedward.simulations.failure import Failure
from fedward.simulations.ray_trainer import ray_trainers
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny

LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
LISTENING = "0A"


def listeners() -> set[str]:
    """Addresses and ports, as the kernel writes them, on which this machine listens."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return {line[1] for line in lines if line[3] == LISTENING}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_ray_gives_the_adapter_that_this_process_gives(tmp_path, base):
    plan, sites = tiny.make_plan(base), tiny.make_sites(3)
    here = tiny.make_federation(tmp_path / "here", plan, tiny.recorders(sites)).run()
    keys = {name: tiny.key(name) for name in sites}
    before = listeners()
    with ray_trainers(sites, 2, keys=keys) as trainers:
        added = listeners() - before
        assert added
        assert all(address.startswith(LOOPBACK) for address in added), "nobody else can connect"
        there = tiny.make_federation(tmp_path / "there", plan, trainers, workers=2).run()
        request = TrainRequest(
            plan=plan,
            attempt=Attempt(run="r", round=1),
            draw=0,
            adapter=tuned_model(plan).start,
            layout=tuned_model(plan).layout,
        )
        with pytest.raises(ModelError):
            trainers["b"].train(dataclasses.replace(request, adapter=b"none"))
        with pytest.raises(DataError, match="no held-out records"):
            trainers["a"].evaluate(plan, request.adapter, "r")
    assert here == there


@pytest.mark.parametrize(
    "error", [DataError("x"), InvalidValue("key", 1, "2"), PolicyRefusal(["one", "two"])]
)
def test_an_error_crosses_with_class_and_message(error):
    crossed = Failure(kind=type(error), text=str(error)).error()
    assert type(crossed) is type(error)
    assert str(crossed) == str(error)


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'fedward\[ray\]'"),
        ray_trainers(tiny.make_sites(3), 2),
    ):
        pass


def test_no_workers_no_training():
    with pytest.raises(InvalidValue, match="workers = 0"), ray_trainers({}, 0):
        pass
