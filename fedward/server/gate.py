"""``[gate]``: the coordinator tries a round's adapter on its own records before it takes it.

What it looks at is a sum that is private already, and records that it may use: a refusal costs no
patient anything beyond the round. It has to come from the mean of all sites, because nobody sees an
update: a round that hurts is refused whole, and no site is ever searched for by summing some of
them again (that would sum an input twice).

On the coordinator the evaluation runs in a process of its own, so that no run holds a model between
its rounds: ``python -m fedward.server.gate WORK DATA BASE``.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedward.canonical import Json, digest
from fedward.errors import FedwardError, ModelError
from fedward.plan import Plan, from_json
from fedward.plan_gate import Gate
from fedward.private_files import make_private_folder, write_private
from fedward.server.apart import last_line, run_apart
from fedward.tuning.records import Records, read_records

_LOG = logging.getLogger(__name__)

Loss = Callable[[bytes], float]
"""Mean loss of an adapter (safetensors bytes) on the coordinator's held-out records."""

_PLAN, _ADAPTER, _RESULT = "plan.json", "adapter.safetensors", "loss.json"


def judge(
    gate: Gate,
    loss: Loss,
    before: bytes,
    after: bytes,
    mean: npt.NDArray[np.float64],
    lowest: float = math.inf,
) -> tuple[str, dict[str, Json]]:
    """Whether a round may move the adapter.

    Args:
        gate: The plan's.
        loss: Tries an adapter.
        before: The adapter that the round began with.
        after: What it would become.
        mean: ``(words,)``: the mean of what the sites sent.
        lowest: The lowest loss that the run has had. Poison in small portions is measured by it.

    Returns:
        Why the round is refused, empty if it is not; and the figures: ``norm`` of the mean and,
        where that does not decide alone, the ``lowest`` loss and that ``after`` the round (null:
        not finite).
    """
    norm = float(np.linalg.norm(mean))
    if gate.norm is not None and norm > gate.norm:
        return f"the mean's norm is {norm:.4g}, above {gate.norm:g}", {"norm": norm}
    lowest, then = min(lowest, loss(before)), loss(after)
    figures: dict[str, Json] = {"norm": norm, "lowest": _finite(lowest), "after": _finite(then)}
    if math.isfinite(then) and then <= lowest + gate.worse_by:
        return "", figures
    return f"held-out loss {then:.4f}, above {lowest:.4f} + {gate.worse_by:g}", figures


def held_out_loss(plan: Plan, records: Records, device: str = "cpu") -> Loss:
    """Tries adapters in this process.

    Args:
        plan: Frozen; its ``[model] path`` is where the base is here.
        records: From :func:`gate_records`.
        device: A torch device.
    """
    from fedward.tuning.adapter import from_bytes, load_adapter  # imports torch
    from fedward.tuning.metrics import evaluate
    from fedward.tuning.objectives import encode
    from fedward.tuning.tuned import tuned_model, with_reference

    tuned = tuned_model(plan, device)
    encoded = with_reference(tuned, encode(records, tuned.tokenizer, plan))

    @lru_cache(maxsize=2)
    def loss(adapter: bytes) -> float:
        load_adapter(tuned.model, from_bytes(adapter))
        return evaluate(tuned.model, encoded, batch_size=min(64, plan.rounds.physical_batch)).loss

    return loss


def gate_records(plan: Plan, path: Path) -> Records:
    """The held-out records of a file; whose they are and from which site does not matter.

    Raises:
        DataError: They do not fit the plan.
    """
    data = dataclasses.replace(plan.data, unit=None, site=None, split=None)
    return read_records(path, dataclasses.replace(plan, data=data))


def loss_apart(
    plan: Plan,
    data: Path,
    base: Path,
    adapter: bytes,
    work: Path,
    look: Callable[[], None] = lambda: None,
) -> float:
    """Try one adapter in a process of its own; what was tried before is known.

    Args:
        plan: The frozen plan.
        data: The file of records, which stays as it was when the run started.
        base: The base model's folder.
        adapter: Safetensors bytes.
        work: Each plan and adapter have a folder in it.
        look: Called meanwhile; what it raises ends the process.

    Raises:
        ModelError: The evaluation failed; the message has its last line.
    """
    files = {_PLAN: plan.to_json(), _ADAPTER: adapter}
    work = work / digest("gate", *files.values()).hex()[:16]
    result, said = work / _RESULT, work / "said"
    if not result.exists():
        make_private_folder(work)
        for name, content in files.items():
            write_private(work / name, content)
        status = run_apart("fedward.server.gate", [work, data, base], said, look)
        if not result.exists():
            raise ModelError(f"the gate's evaluation ended with {status}: {last_line(said)}")
        for name in files:
            (work / name).unlink()
    return float(json.loads(result.read_bytes()))


def main(work: Path, data: Path, base: Path) -> int:
    """Do what :func:`loss_apart` has asked for; returns the exit status."""
    from fedward.server.central.loading import device

    try:
        plan = from_json((work / _PLAN).read_bytes())
        here = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=str(base)))
        loss = held_out_loss(here, gate_records(here, data), device())
        found = loss((work / _ADAPTER).read_bytes())
        write_private(work / _RESULT, json.dumps(found).encode())
    except FedwardError as error:
        _LOG.error("%s", error)
        return 1
    return 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main(*map(Path, sys.argv[1:])))
