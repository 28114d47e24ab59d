"""TensorBoard and MLflow show each point once, also after a resumption, and nothing is sent."""

import json
import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedward.errors import ConfigurationError
from fedward.server.central.job import Log, Step
from tests.server.central.rig import build_base, make_step, run


def points_of_tensorboard(out: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / "sft"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def points_of_mlflow(out: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(out.name)
    assert experiment is not None
    (active,) = client.search_runs([experiment.experiment_id])
    assert active.info.status == "FINISHED"
    found = client.get_metric_history(active.info.run_id, "loss")
    return [(point.step, point.value) for point in found]


def interrupted(out: Path, step: Step) -> None:
    """As if the training had been killed after its second step's checkpoint."""
    shutil.rmtree(out / "sft" / "model")
    (out / "sft" / "report.json").unlink()
    shutil.rmtree(out / "sft" / "checkpoints" / "checkpoint-4")
    run(step, out=out, resume=True)


@pytest.mark.parametrize(
    ("name", "package", "points"),
    [
        ("tensorboard", "tensorboard", points_of_tensorboard),
        ("mlflow", "mlflow-skinny", points_of_mlflow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_each_point_once(tmp_path, monkeypatch, name, package, points):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is an extra")
    asked = list[str]()

    def look_up(host: object, *_: object, **__: object) -> object:
        asked.append(str(host))
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    base = build_base(tmp_path / "base")
    train = {"max_steps": 4, "save_steps": 2}
    step = make_step(base, tmp_path, "sft", train=train, log=Log(to=(name,)))
    out = tmp_path / "out"
    run(step, out=out)
    lines = [json.loads(x) for x in (out / "sft" / "log.jsonl").read_text().splitlines()]
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert points(out) == expected
    interrupted(out, step)
    assert points(out) == expected
    assert asked == []


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    step = make_step(build_base(tmp_path / "base"), tmp_path, "sft", log=Log(to=("mlflow",)))
    with pytest.raises(ConfigurationError, match=r"pip install 'fedward\[mlflow\]'"):
        run(step, out=tmp_path / "out")
