"""What of an adapter stays at its site: kept from round to round, and never sent.

Personal parts are trained by the same clipped and noised steps as what is sent, and what is sent
next depends on them. So they may only go on from a training that the ledger has charged: parts are
kept under the number of updates of the run that have left, and a training whose update never left
is forgotten together with its parts. SCAFFOLD's control variate is kept alike, and goes on from the
last update that is in a committed sum.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedward.canonical import digest
from fedward.client.training import TrainRequest
from fedward.plan import Plan
from fedward.private_files import make_private_folder, write_private
from fedward.tuning.adapter import State, adapter_state, from_bytes, load_adapter, to_bytes

_LOG = logging.getLogger(__name__)


class PersonalParts:
    """The personal parts of every run of a site, as files of its own.

    Args:
        folder: Made when it is needed; left out, nothing is kept, and every round begins anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def before(self, request: TrainRequest) -> State:
        """The parts that the update was trained with which the request goes on from, if any.

        Raises:
            ModelError: The file is damaged.
        """
        path = self._path(request, request.basis)
        if path is not None and path.exists():
            return from_bytes(path.read_bytes())
        if request.basis:
            run = request.attempt.run
            _LOG.warning("what this site kept of run %r is gone: it begins anew", run)
        return {}

    def keep(self, request: TrainRequest, parts: Mapping[str, Tensor]) -> None:
        """Keep what a training made, in case its update leaves; durable on return."""
        path, before = (self._path(request, n) for n in (request.spent + 1, request.basis))
        if path is None:
            return
        make_private_folder(path.parent)
        write_private(path, to_bytes({n: part.detach().cpu().clone() for n, part in parts.items()}))
        for other in set(path.parent.glob("*.safetensors")) - {path, before}:
            other.unlink()

    def newest(self, plan: Plan, run: str) -> State:
        """The parts that a run of a plan kept last; none before its first training.

        For the site's own eyes: the update that they were trained with may not have left yet.

        Raises:
            ModelError: The file is damaged.
        """
        if self._folder is None:
            return {}
        files = (self._folder / plan.hash().hex() / _name(run)).glob("*.safetensors")
        path = max(files, key=lambda file: int(file.stem), default=None)
        return {} if path is None else from_bytes(path.read_bytes())

    def forget(self, run: str) -> int:
        """Delete what was kept of a run, under whatever plan; returns how many files there were."""
        files = list(self._folder.glob(f"*/{_name(run)}/*.safetensors")) if self._folder else []
        for file in files:
            file.unlink()
        return len(files)

    @staticmethod
    def put(model: nn.Module, parts: State) -> None:
        """Set a model's personal parts.

        Raises:
            ModelError: A tensor is not the model's, or has another shape.
        """
        load_adapter(model, adapter_state(model) | parts)

    def _path(self, request: TrainRequest, spent: int) -> Path | None:
        """Where the parts of a run lie after so many of its updates have left."""
        if self._folder is None:
            return None
        folder = self._folder / request.plan.hash().hex() / _name(request.attempt.run)
        return folder / f"{spent}.safetensors"


def _name(run: str) -> str:
    """A run's folder; its name is the coordinator's to choose."""
    return digest("run", run).hex()
