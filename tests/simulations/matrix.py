"""Every tuner x objective x scheme x privacy that sites train, as whole federations in miniature.

python -m tests.simulations.matrix               # run them, and print the table
python -m tests.simulations.matrix --write       # and put it into docs/federated-methods.md
"""

import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedward.errors import ConfigurationError, FedwardError
from fedward.plan import Data, Plan, Task, Tuner
from fedward.plan_aggregation import Aggregation
from fedward.plan_tuner import LORA, METHODS, REFUSED
from fedward.tuning import methods
from fedward.tuning.adapter import from_bytes
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny

PAGE = Path(__file__).parents[2] / "docs" / "federated-methods.md"
_LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
_BIASES = {"bias": "lora_only", "lora_bias": True}
TUNERS: dict[str, Tuner] = {
    "lora": Tuner(arguments=_LORA),
    "qlora (nf4)": Tuner(arguments=_LORA),
    "rslora": Tuner(method="rslora", arguments=_LORA),
    "dora": Tuner(method="dora", arguments=_LORA),
    "lora+": Tuner(method="lora+", arguments=_LORA),
    "lora + biases": Tuner(arguments=_LORA | _BIASES),
    "houlsby": Tuner(method="houlsby", arguments={"r": 2}),
    "pfeiffer": Tuner(method="pfeiffer", arguments={"r": 2}),
    "ia3": Tuner(method="ia3"),
    "vera": Tuner(method="vera", arguments={"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "oft": Tuner(method="oft", arguments={"oft_block_size": 8, "target_modules": ["q_proj"]}),
    "bitfit": Tuner(method="bitfit", arguments={"target_modules": ["q_proj"]}),
    "prompt": Tuner(method="prompt", arguments={"num_virtual_tokens": 2}),
    "prefix": Tuner(method="prefix", arguments={"num_virtual_tokens": 2}),
    "p-tuning": Tuner(
        method="p-tuning", arguments={"num_virtual_tokens": 2, "encoder_hidden_size": 8}
    ),
}
OBJECTIVES: dict[str, tuple[Any, Any]] = {
    "classify": (Task(objective="classify", labels=tiny.LABELS, max_length=16), {}),
    "sft": (Task(objective="sft", max_length=16), {}),
    "dpo": (
        Task(objective="dpo", max_length=16),
        {"prompt": "hospital", "chosen": "text", "rejected": "label"},
    ),
    "kto": (
        Task(objective="kto", max_length=16),
        {"prompt": "hospital", "completion": "text", "label": "wanted"},
    ),
}
WAYS = ("fedavg", "ffa", "alternating", "sketch", "sketch-once", "pooled")
PRIVACY = ("epsilon 8", "none")
WORKS, NOT_TRAINED = "yes", "-"

Cell = tuple[str, str, str, str]


def cells() -> list[Cell]:
    """Tuner, objective, way and privacy."""
    return list(itertools.product(TUNERS, OBJECTIVES, WAYS, PRIVACY))


def plan_of(base: Path, cell: Cell) -> Plan:
    """Two rounds of one step over the tiny Llama."""
    tuner, objective, way, privacy = cell
    scheme: Any = "fedavg" if way == "pooled" else way
    given: dict[str, Any] = {
        "mode": "pooled" if way == "pooled" else "local",
        "tuner": TUNERS[tuner],
        "rounds": tiny.make_rounds(optimizer="sgd", learning_rate=0.1),
        "aggregation": Aggregation(scheme=scheme, update_clip=10.0),
    }
    task, columns = OBJECTIVES[objective]
    given["task"] = task
    given["data"] = Data(unit="patient", site="hospital", **columns)
    if privacy == "none":
        given["privacy"] = tiny.NAKED
    plan = tiny.make_plan(base, **given)
    if tuner.startswith("qlora"):
        plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, quantize="nf4"))
    return plan


def outcome(base: Path, folder: Path, cell: Cell) -> str:
    """``yes`` if both rounds were committed by all sites and something moved; ``-`` if refused.

    Refused is what no site is asked to train: by the plan, or by its model before the run.
    """
    try:
        plan = plan_of(base, cell)
        start = from_bytes(tuned_model(plan).start)
    except ConfigurationError:
        return NOT_TRAINED
    try:
        sites = {name: _wanted(records) for name, records in tiny.make_sites(3).items()}
        after = from_bytes(tiny.make_federation(folder, plan, tiny.recorders(sites)).run())
    except FedwardError as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    assert tiny.cohorts(folder) == [[0, 1, 2]] * 2, cell
    assert all(torch.isfinite(part).all() for part in after.values()), cell
    moved = [name for name in start if not torch.equal(start[name], after[name])]
    assert moved, f"{cell}: nothing moved"
    return WORKS


def _wanted(records: Records) -> Records:
    """The records with a column of whether the answer is wanted: every other patient's."""
    rows = [{**row, "wanted": number % 4 < 2} for number, row in enumerate(records.rows)]
    return dataclasses.replace(records, rows=tuple(rows))


def run() -> dict[Cell, str]:
    """Every cell's outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny.build_base(Path(scratch) / "base")
        return {
            cell: outcome(base, Path(scratch) / str(number), cell)
            for number, cell in enumerate(cells())
        }


def table(found: dict[Cell, str]) -> str:
    """Rows of tuner and objective, columns of ways; with privacy / without."""
    lines = [f"| tuner | objective | {' | '.join(WAYS)} |", "|---" * (2 + len(WAYS)) + "|"]
    for tuner, objective in itertools.product(TUNERS, OBJECTIVES):
        each = [" / ".join(found[tuner, objective, way, p] for p in PRIVACY) for way in WAYS]
        lines.append(f"| {tuner} | {objective} | {' | '.join(each)} |")
    return "\n".join(lines)


def methods_table() -> str:
    """Every method of central training: what it trains, and whether sites do or why not."""
    lines = ["| method | trains | at sites |", "|---|---|---|"]
    for name, method in methods.METHODS.items():
        ways = "every way" if name in LORA else "`fedavg` and pooled"
        if name == "lora+":
            ways = "every way but pooled, whose one step has one rate"
        answer = f"trains, {ways}" if name in METHODS else f"refused: use {REFUSED[name]}"
        lines.append(f"| `{name}` | {method.what} | {answer} |")
    return "\n".join(lines)


def put(name: str, text: str) -> None:
    """Put a table between its marks on the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(f"<!-- {name} -->\n")
    after = rest.split("<!-- end -->", 1)[1]
    PAGE.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end -->{after}", encoding="utf-8")


def main() -> None:
    """Run every cell; print the table or put it and that of the methods into the page."""
    found = run()
    text = table(found)
    sys.stdout.write(text + "\n")
    if "--write" in sys.argv:
        put("methods", methods_table())
        put("matrix", text)


if __name__ == "__main__":
    main()
