"""What a trainer logs: JSON lines, also shown by TensorBoard or MLflow where a job asks for it.

All write into the job's folder and reach nobody. A resumed training begins its run anew with what
its checkpoint remembers, so that no point stands there twice.
"""

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fedward.errors import ConfigurationError
from fedward.server.central.job import Log

LOG = "log.jsonl"
"""A line for each time that a trainer logs."""

_NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


def trackers(log: Log, folder: Path, run: str) -> list[TrainerCallback]:
    """The callbacks that keep a step's log, and those that ``[log]`` asks for.

    Args:
        log: Whom to tell.
        folder: The job's.
        run: The name of the step.

    Raises:
        ConfigurationError: What is asked for is not installed.
    """
    for name in log.to:
        if find_spec(_NEEDS[name]) is None:
            raise ConfigurationError(f"[log] to: pip install 'fedward[{name}]'")
    kinds = {"tensorboard": _Tensorboard, "mlflow": _Mlflow}
    asked = [kinds[name] for name in dict.fromkeys(log.to)]
    return [kind(folder, run) for kind in (_Lines, *asked)]


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)


class _Tracker(TrainerCallback, ABC):
    """Begins a run with what is known, and goes on with each line that is logged."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    @abstractmethod
    def begin(self) -> None:
        """Remove what an interrupted training left of this run, and open a new one."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line of the log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Begin, with what a checkpoint remembers."""
        if state.is_world_process_zero:
            self.begin()
            for line in state.log_history:
                self.write(line)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Add the line that was just logged."""
        if state.is_world_process_zero:
            self.write(state.log_history[-1])


class _Lines(_Tracker):
    """``log.jsonl`` in the step's folder."""

    def begin(self) -> None:
        self.path = self.folder / self.run / LOG
        self.path.write_text("", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _Tensorboard(_Tracker):
    """Event files in ``tensorboard/``, a folder for each step of the job."""

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        own = self.folder / "tensorboard" / self.run
        shutil.rmtree(own, ignore_errors=True)
        self.writer = SummaryWriter(str(own))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line):
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()


class _Mlflow(_Tracker):
    """One experiment in ``mlflow.db``, a run for each step of the job."""

    def begin(self) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra

        self.client = MlflowClient(f"sqlite:///{self.folder.resolve() / 'mlflow.db'}")
        experiment = self.client.get_experiment_by_name(self.folder.name)
        if experiment is None:
            own = self.client.create_experiment(
                self.folder.name, artifact_location=(self.folder.resolve() / "mlflow").as_uri()
            )
        else:
            own = experiment.experiment_id
        for run in self.client.search_runs([own]):
            if run.info.run_name == self.run:
                self.client.delete_run(run.info.run_id)
        self.own = self.client.create_run(own, run_name=self.run).info.run_id

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line):
            self.client.log_metric(self.own, name, value, step=line["step"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Say that the run is finished; the last evaluation is still added."""
        if state.is_world_process_zero:
            self.client.set_terminated(self.own)
