"""Which tuner goes with which stage over which base: refused before any model is loaded.

Every cell that this table allows is a slow test, which trains, saves, loads and resumes it; the
default suite takes a sample. Which cells were run is said in ``docs/central-training.md``. What is
refused fails in the libraries or trains nothing.
"""

from typing import Literal

from fedward.errors import ConfigurationError
from fedward.server.central.job import REWARDED, STAGES, Stage, Step
from fedward.tuning.methods import METHODS, check_method

Base = Literal["none", "nf4", "int8"]
BASES: tuple[Base, ...] = ("none", "nf4", "int8")


def refusal(stage: Stage, method: str, base: Base) -> str | None:
    """Why a stage cannot be trained with a tuner over a base, or None where it can."""
    if METHODS[method].config is None and base != "none":
        return "quantised weights cannot be trained: use a tuner, or quantize = 'none'"
    if method == "qlora" and base != "nf4":
        return "qlora is LoRA over an NF4 base: set quantize = 'nf4', or use lora"
    if method == "pissa" and base != "none":
        return "its start takes the base's weights apart, which a quantised base has only rounded"
    if method == "dora" and base == "int8":
        return "bitsandbytes gives DoRA no int8 weight to read on a CPU: use quantize = 'nf4'"
    if METHODS[method].prompts and stage == "distill":
        return "the distillation loss calls the model below the trained vectors"
    if stage in REWARDED and method in ("prompt", "p-tuning"):
        return "PEFT ignores the positions of prompts that are padded on the left"
    if stage == "orpo" and method in ("prompt", "p-tuning"):
        return "TRL's loss does not know of the positions that are put before the input"
    return None


def check_step(step: Step) -> None:
    """Refuse a step whose tuner is unknown, misspelt, or does not go with its stage or base.

    Raises:
        ConfigurationError: With the reason.
    """
    method, base = step.tuner.method, step.model.quantize
    check_method(method, step.tuner.arguments)
    reason = refusal(step.stage, method, base)
    if reason is not None:
        where = f"stage {step.stage!r} with tuner {method!r} and quantize = {base!r}"
        raise ConfigurationError(f"{where}: {reason}")


def tuners_table() -> str:
    """The tuners and over which bases each is valid, as Markdown, as `fedward train --tuners`."""
    heads = ["tuner", "what it trains", *STAGES]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for name, method in METHODS.items():
        cells = [_cell(stage, name) for stage in STAGES]
        source = f" ({method.source})" if method.source else ""
        lines.append(" | ".join([f"`{name}`", method.what + source, *cells]))
    return "".join(f"| {line} |\n" for line in lines)


def _cell(stage: Stage, method: str) -> str:
    held = {"none": "32", "nf4": "4", "int8": "8"}
    valid = [held[base] for base in BASES if refusal(stage, method, base) is None]
    return " ".join(valid) or "no"
