"""Checkpoints from which every tuner goes on bit for bit.

transformers keeps optimizer, schedule, random numbers and place; of an adapter it keeps what PEFT
exports. That is not all that is trained (p-tuning's network is left out), nor AdaLoRA's memory of
what mattered, nor PPO's critic. So the rest stands in ``training.safetensors`` beside it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  # torch raises it; nothing is unpickled here
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler

from fedward.errors import ConfigurationError
from fedward.tuning.experts import has_experts
from fedward.tuning.methods import without_peft_noise
from fedward.tuning.tuners import trainable

_FILE = "training.safetensors"
_MEMORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder, or None.

    ``trainer_state.json`` is written last, so that a checkpoint without it was interrupted.
    """
    found = dict[int, Path]()
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found[int(json.loads(path.read_bytes())["global_step"])] = path.parent
        except (ValueError, KeyError):
            continue  # half written
    return found[max(found)] if found else None


def exact(cls: Any) -> Any:  # noqa: ANN401  # a trainer class of TRL, which is Any
    """A trainer class whose checkpoints hold all that it trains.

    Models that are sharded over processes are left to transformers.
    """

    class Exact(_careful(cls)):  # type: ignore[misc]
        """The class with checkpoints of its own."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            return _by_epoch(super()._get_train_sampler(*args, **kwargs), self.args.seed)

        def save_model(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            with without_peft_noise():
                super().save_model(*args, **kwargs)

        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
            if self.args.should_save:
                place = f"checkpoint-{self.state.global_step}"
                folder = Path(self._get_output_dir(trial=trial)) / place
                folder.mkdir(parents=True, exist_ok=True)
                save_file(training_state(self), folder / _FILE)
            super()._save_checkpoint(model, trial)

        def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
            if _left_to_transformers(self):
                super()._load_from_checkpoint(checkpoint, model)
            restore(self, Path(checkpoint))

        def _load_best_model(self) -> None:
            if _left_to_transformers(self):
                super()._load_best_model()
            restore(self, Path(self.state.best_model_checkpoint))

    return Exact


def _careful(cls: Any) -> Any:  # noqa: ANN401  # as above
    """A trainer class that says which checkpoint cannot be read."""

    class Careful(cls):  # type: ignore[misc]
        """The class with errors of Fedward's."""

        def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
            with _tensors_alone(checkpoint):
                super()._load_from_checkpoint(checkpoint, model)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            with _tensors_alone(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            with _tensors_alone(checkpoint):
                super()._load_rng_state(checkpoint)

    return Careful


@contextlib.contextmanager
def _tensors_alone(checkpoint: str | None) -> Iterator[None]:
    """Tell a checkpoint's file that is no plain tensors from a defect of the program.

    transformers reads its ``.pt`` files with ``weights_only``: torch's reader knows tensors and
    plain values, and refuses a pickle that names anything else before it runs.
    """
    try:
        yield
    except (UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise ConfigurationError(
            f"{checkpoint}: cannot be read as tensors alone ({type(error).__name__}): remove it"
        ) from error


class _EpochSampler(RepeatSampler):
    """TRL's sampler, whose order of an epoch depends on the epoch alone.

    TRL's own goes on with one generator, so that a training resumed after its first epoch would
    see the prompts in another order.
    """

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before every epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


def _by_epoch(sampler: Any, seed: int) -> Any:  # noqa: ANN401  # torch's
    """TRL's sampler of prompts as one whose order follows from the epoch; any other as it is."""
    if not isinstance(sampler, RepeatSampler):
        return sampler
    return _EpochSampler(
        sampler.data_source,
        sampler.mini_repeat_count,
        batch_size=sampler.batch_size,
        repeat_count=sampler.repeat_count,
        shuffle=sampler.shuffle,
        seed=seed,
    )


def training_state(trainer: Any) -> dict[str, Tensor]:  # noqa: ANN401  # TRL's trainer
    """What a trainer trains beyond what transformers saves, by name."""
    if _sharded(trainer):
        return {}
    state = {key: p.detach().cpu().contiguous() for key, p in _parameters(trainer).items()}
    config, allocator = _adalora(trainer.model)
    if allocator is not None:
        for memory in _MEMORIES:
            held: Mapping[str, Tensor] = vars(allocator)[memory]
            state |= {f"{memory}:{n}": tensor.cpu().contiguous() for n, tensor in held.items()}
        ranks: Mapping[str, list[bool]] = config.rank_pattern or {}
        state |= {f"ranks:{name}": torch.tensor(kept) for name, kept in ranks.items()}
    return state


def restore(trainer: Any, folder: Path) -> None:  # noqa: ANN401  # TRL's trainer
    """Put back what :func:`training_state` gave.

    Raises:
        ConfigurationError: The checkpoint is broken or of another model.
    """
    if _sharded(trainer):
        return
    try:
        state = load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{folder}: not a readable checkpoint: remove it") from error
    parameters = _parameters(trainer)
    if parameters.keys() - state.keys():
        raise ConfigurationError(f"{folder}: a checkpoint of another model: remove it")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    config, allocator = _adalora(trainer.model)
    if allocator is None:
        return
    device = trainer.accelerator.device
    for memory in _MEMORIES:
        vars(allocator)[memory] = {
            name.partition(":")[2]: tensor.to(device)
            for name, tensor in state.items()
            if name.startswith(f"{memory}:")
        }
    ranks = {n.partition(":")[2]: t.tolist() for n, t in state.items() if n.startswith("ranks:")}
    config.rank_pattern = ranks or None


def _parameters(trainer: Any) -> dict[str, nn.Parameter]:  # noqa: ANN401  # TRL's trainer
    parts: dict[str, nn.Module | None] = {"critic": vars(trainer).get("critic")}
    if isinstance(trainer.model, PeftModel):
        parts["model"] = trainer.model
    found = {
        f"{key}:{name}": parameter
        for key, part in parts.items()
        if part is not None
        for name, parameter in trainable(part).items()
    }
    if "model" not in parts and has_experts(trainer.model):
        # transformers saves fused experts apart, and its trainer does not put them together again.
        found |= {f"model:{name}": p for name, p in trainer.model.named_parameters()}
    return found


def _adalora(model: nn.Module) -> tuple[Any, Any]:
    """AdaLoRA's configuration and rank allocator, or two None."""
    inner = model.base_model if isinstance(model, PeftModel) else None
    allocator = None if inner is None else vars(inner).get("rankallocator")
    return (None, None) if allocator is None else (model.peft_config["default"], allocator)  # type: ignore[index]  # PEFT's


def _left_to_transformers(trainer: Any) -> bool:  # noqa: ANN401  # TRL's trainer
    return not isinstance(trainer.model, PeftModel) or _sharded(trainer)


def _sharded(trainer: Any) -> bool:  # noqa: ANN401  # TRL's trainer
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
