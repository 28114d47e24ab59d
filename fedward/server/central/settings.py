"""``[train]`` as TRL's configuration of a stage: its keys, checked, with what follows from the job.

TRL's own defaults hold, but for these: nothing is reported anywhere, two checkpoints are kept, and
bfloat16 is used where the base is quantised or the GPU has it.
"""

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from fedward.errors import ConfigurationError, InvalidValue
from fedward.server.central.job import Stage, Step
from fedward.tuning.methods import unknown

CLASSES: Mapping[Stage, str] = {
    "sft": "trl.trainer.sft:SFT",
    "classify": "fedward.server.central.classify:Classify",
    "reward": "trl.trainer.reward:Reward",
    "dpo": "trl.trainer.dpo:DPO",
    "kto": "trl.trainer.kto:KTO",
    "orpo": "trl.experimental.orpo.orpo:ORPO",
    "grpo": "trl.trainer.grpo:GRPO",
    "rloo": "trl.trainer.rloo:RLOO",
    "ppo": "fedward.server.central.ppo:PPO",
    "distill": "trl.trainer.distillation:Distillation",
}
"""Beginning of the modules and classes of a stage: ``x:Y`` is ``x_config:YConfig`` and so on."""

_FOLLOWS = (
    "activation_checkpointing",
    "chat_template_path",
    "disable_tqdm",
    "gradient_checkpointing",
    "load_best_model_at_end",
    "model_init_kwargs",
    "output_dir",
    "quantization_config",
    "report_to",
    "resume_from_checkpoint",
    "seed",
    "teacher_model_init_kwargs",
    "trust_remote_code",
)
_ELSEWHERE = ("hub_", "push_to_hub", "trackio", "vllm_server", "log_completions_hub")
"""Beginnings of keys that would send something away."""


def load_class(stage: Stage, which: Literal["config", "trainer"]) -> Any:  # noqa: ANN401  # TRL's
    """The configuration or trainer class of a stage; TRL takes seconds to import."""
    module, _, name = CLASSES[stage].partition(":")
    return vars(importlib.import_module(f"{module}_{which}"))[name + which.capitalize()]


def settings(step: Step, folder: Path) -> Any:  # noqa: ANN401  # TRL's class of the stage
    """TRL's configuration of a step.

    Args:
        step: Its ``[train]``, seed, model and ``[stop]``.
        folder: Where checkpoints go.

    Raises:
        ConfigurationError: An unknown key with the nearest name, a value of another type, or one
            that TRL refuses.
    """
    cls = load_class(step.stage, "config")
    given = dict(step.train.arguments)
    _check(given, cls)
    cuda = torch.cuda.is_available()
    quantised = step.model.quantize != "none"
    usual: dict[str, Any] = {
        "bf16": quantised or (cuda and torch.cuda.is_bf16_supported()),
        "dataloader_pin_memory": cuda,
        "use_cpu": not cuda,  # or bfloat16 is refused there
        "save_total_limit": 2,
    }
    if step.stop is not None:
        usual |= {"eval_strategy": "epoch", "save_strategy": given.get("eval_strategy", "epoch")}
    fixed = {
        "output_dir": str(folder),
        "report_to": "none",  # [log] has callbacks of its own
        "seed": step.seed,
        "disable_tqdm": True,
        "activation_checkpointing": step.model.gradient_checkpointing,
        "gradient_checkpointing": None,  # the old name, which TRL still sets
        "load_best_model_at_end": step.stop is not None,
    }
    if given.get("fp16"):
        usual["bf16"] = False
    if quantised and not {**usual, **given}["bf16"]:
        # The score head and the hidden states would meet in two precisions.
        raise InvalidValue("[train] bf16", False, "true over a quantised base")
    try:
        return cls(**{**usual, **given, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"[train] TRL refuses it: {error}") from error


def _check(given: Mapping[str, Any], cls: Any) -> None:  # noqa: ANN401  # TRL's class
    hints = typing.get_type_hints(cls)
    fields = [item.name for item in dataclasses.fields(cls) if item.init]
    known = [name for name in fields if name not in _FOLLOWS and not name.startswith(_ELSEWHERE)]
    for key, value in given.items():
        if key in _FOLLOWS:
            raise ConfigurationError(f"[train] {key!r} follows from the rest of the job")
        if key not in known:
            near = unknown("key", key, known)
            raise ConfigurationError(f"[train] {near if 'mean' in near else near.split(';')[0]}")
        kinds = _plain(hints[key])
        if kinds and type(value) not in kinds:
            words = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise InvalidValue(f"[train] {key}", value, f"a value of type {words}")


def _plain(hint: Any) -> set[type]:  # noqa: ANN401  # a type
    """The plain types that a field takes; empty where it takes others too."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(hint) if union else [hint]) - {types.NoneType}
    if not kinds <= {bool, int, float, str}:
        return set()
    return kinds | ({int} if float in kinds else set())
