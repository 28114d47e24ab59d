"""Trainers in Ray actors: training spreads over processes, everything else stays in the driver.

Agents, sessions and the round engine see the same :class:`~fedward.client.training.Trainer` as
ever. Each actor is one process with one thread and one loaded model, and serves some of the sites.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedward.client.trainer import LocalTrainer
from fedward.client.training import Scores, Trainer, TrainRequest, TrainResult
from fedward.errors import FedwardError, InvalidValue, ModelError
from fedward.local_ray import local_ray
from fedward.plan import Plan
from fedward.simulations.failure import Failure
from fedward.tuning.records import Records

_Result = TypeVar("_Result")


@contextlib.contextmanager
def ray_trainers(
    sites: Mapping[str, Records],
    workers: int,
    *,
    held_out: Mapping[str, Records] | None = None,
    keys: Mapping[str, bytes] | None = None,
    keep: Path | None = None,
) -> Iterator[dict[str, Trainer]]:
    """Start a Ray of its own on this machine, with trainers in it, until the context ends.

    Ray listens on loopback only, without a dashboard; a cluster that runs already is not used.

    Args:
        sites: Site name → its training records.
        workers: Processes, 1 or more; site i is served by process i modulo ``workers``.
        held_out: Site name → records for the site's own metrics.
        keys: Site name → secret key of noise and sampling; only tests fix them.
        keep: Folder of the sites' personal parts.

    Yields:
        Site name → its trainer.

    Raises:
        ConfigurationError: Ray is not installed or does not start.
    """
    if workers < 1:
        raise InvalidValue("workers", workers, "1 or more")
    with local_ray(workers, "--engine ray") as ray:
        held_out, keys = held_out or {}, keys or {}
        places = {
            name: _Place(
                records=records,
                held_out=held_out.get(name),
                key=keys.get(name),
                keep=keep and keep / f"{number}",
            )
            for number, (name, records) in enumerate(sorted(sites.items()))
        }
        names = list(sites)
        remote = ray.remote(num_cpus=1)(_Worker)
        actors = [
            remote.remote({name: places[name] for name in names[start::workers]})
            for start in range(min(workers, len(names)))
        ]
        yield {
            name: _RayTrainer(ray, actors[number % workers], name)
            for number, name in enumerate(names)
        }


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What an actor needs to know of one site."""

    records: Records
    held_out: Records | None
    key: bytes | None
    keep: Path | None


class _Worker:
    """The trainers of some sites, in an actor's process."""

    def __init__(self, places: Mapping[str, _Place]) -> None:
        torch.set_num_threads(1)
        self._trainers = {
            name: LocalTrainer(
                place.records, held_out=place.held_out, key=place.key, keep=place.keep
            )
            for name, place in places.items()
        }

    def prepare(self, site: str, request: TrainRequest) -> Failure | None:
        try:
            self._trainers[site].prepare(request)
        except FedwardError as error:
            return Failure(kind=type(error), text=str(error))
        return None

    def train(self, site: str, request: TrainRequest) -> TrainResult | Failure:
        try:
            return self._trainers[site].train(request)
        except FedwardError as error:
            return Failure(kind=type(error), text=str(error))

    def evaluate(self, site: str, plan: Plan, adapter: bytes, run: str) -> Scores | Failure:
        try:
            return self._trainers[site].evaluate(plan, adapter, run)
        except FedwardError as error:
            return Failure(kind=type(error), text=str(error))


class _RayTrainer:
    """One site's trainer, seen from the driver."""

    def __init__(self, ray: Any, actor: Any, site: str) -> None:  # noqa: ANN401  # Ray has no types
        self._ray, self._actor, self._site = ray, actor, site

    def prepare(self, request: TrainRequest) -> None:
        self._wait(self._actor.prepare.remote(self._site, request), type(None))

    def train(self, request: TrainRequest) -> TrainResult:
        return self._wait(self._actor.train.remote(self._site, request), TrainResult)

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        return self._wait(self._actor.evaluate.remote(self._site, plan, adapter, run), Scores)

    def _wait(self, reference: object, kind: type[_Result]) -> _Result:
        """The actor's result, or its error in the driver."""
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise ModelError(
                f"the process that trains for site {self._site!r} died, perhaps for want of "
                "memory: use fewer --workers"
            ) from error
        if isinstance(result, Failure):
            raise result.error()
        if not isinstance(result, kind):
            raise ModelError(f"a trainer's process answered with {type(result).__name__}")
        return result
