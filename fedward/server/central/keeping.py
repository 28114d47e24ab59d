"""Keeping what a model knew: old rows among the new ones, and weights held near the start.

- Replay: a share of the rows is of the old task.
- L2-SP (Li et al. 2018, arXiv 1802.01483, equation 3): a pull of every trained parameter to where
  it started.
- EWC (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3): the same pull, as strong as the old
  task needs each parameter: its squared gradient there, by the mean over all parameters.

The pull is the gradient of ``weight / 2 * sum(importance * (parameter - start)^2)``, added once a
step to that of the loss, before it is clipped.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from datasets import Dataset, interleave_datasets
from torch import Tensor, nn

from fedward.errors import ConfigurationError, DataError
from fedward.server.central.job import Keep
from fedward.tuning.tuners import trainable

_CLOCKS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens")


def keeping(cls: Any) -> Any:  # noqa: ANN401  # a trainer class of TRL, which is Any
    """A trainer class that can be held near its start; see :func:`hold`."""

    class Keeping(cls):  # type: ignore[misc]
        """The class with a pull to the start."""

        pulls: tuple[tuple[nn.Parameter, Tensor, Tensor | float], ...] = ()

        def training_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # theirs
            loss = super().training_step(*args, **kwargs)
            steps = self.current_gradient_accumulation_steps
            with torch.no_grad():
                for parameter, start, strength in self.pulls:
                    if parameter.grad is not None:
                        parameter.grad.add_(strength * (parameter - start) / steps)
            return loss

    return Keeping


def hold(trainer: Any, keep: Keep, old: Mapping[str, Dataset]) -> None:  # noqa: ANN401  # TRL's
    """Make a trainer keep what its model knows.

    Args:
        trainer: Of a class from :func:`keeping`, at its start, with the new rows.
        keep: What the job says.
        old: Prepared by the trainer: ``old`` to learn from, ``known`` to measure.

    Raises:
        ConfigurationError: A pull where the trained parameters are spread over processes, or
            where gradients are scaled.
    """
    trainer.known = old.get("known")
    if keep.replay:
        trainer.train_dataset = mix(
            trainer.train_dataset, old["old"], keep.replay, trainer.args.seed
        )
    if not keep.l2_sp and not keep.ewc:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.fp16:
        raise ConfigurationError(
            "[keep] l2_sp and ewc need whole parameters and unscaled gradients: no FSDP, no "
            "DeepSpeed, and bf16 in place of fp16"
        )
    needed = importance(trainer, old["old"], keep.ewc_examples) if keep.ewc else {}
    trainer.pulls = tuple(
        (p, p.detach().clone(), keep.l2_sp + keep.ewc * needed.get(name, 0.0))
        for name, p in trainable(trainer.model).items()
    )


def mix(new: Dataset, old: Dataset, share: float, seed: int) -> Dataset:
    """New rows in their order with old ones between them, drawn so that they are ``share`` of all.

    Old rows that are not needed are left out, and few are used again.

    Args:
        new: Of the task to learn.
        old: Of the task to keep.
        share: Above 0 and below 1.
        seed: Decides which old rows, and where they stand.

    Raises:
        DataError: The old rows have other columns than the new.
    """
    if set(new.column_names) != set(old.column_names):
        raise DataError(
            f"[keep] data: expected rows as in [data] train (prepared: {new.column_names}), got "
            f"{old.column_names}"
        )
    needed = min(len(old), ceil(len(new) * share / (1 - share)))
    drawn = old.shuffle(seed=seed).select(range(needed))
    return interleave_datasets(
        [new, drawn],
        probabilities=[1 - share, share],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def importance(trainer: Any, old: Dataset, examples: int) -> dict[str, Tensor]:  # noqa: ANN401  # TRL's
    """How much each trained parameter matters to the old task: the diagonal Fisher information.

    Args:
        trainer: At its start.
        old: Rows as the trainer prepared them; the first ``examples`` are used, one at a time.
        examples: 1 or more.

    Returns:
        For each trained parameter its mean squared gradient, over the mean of all; shaped alike.
    """
    trained = trainable(trainer.model)
    found = {name: torch.zeros_like(p) for name, p in trained.items()}
    batch_size = trainer.args.per_device_eval_batch_size
    trainer.args.per_device_eval_batch_size = 1
    loader = trainer.get_eval_dataloader(old.select(range(min(len(old), examples))))
    trainer.args.per_device_eval_batch_size = batch_size
    was = trainer.model.training
    trainer.model.eval()
    for row in loader:
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, row).backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                found[name] += parameter.grad.square()
                parameter.grad = None
    trainer.model.train(was)
    for metrics in vars(trainer).get("_metrics", {}).values():
        metrics.clear()  # TRL would count these rows with the first evaluation
    found = {name: trainer.accelerator.reduce(each) for name, each in found.items()}
    mean = sum(float(each.sum()) for each in found.values()) / sum(
        p.numel() for p in trained.values()
    )
    return {name: each / mean for name, each in found.items()} if mean else found


def measure(trainer: Any) -> dict[str, float]:  # noqa: ANN401  # TRL's trainer
    """What the model scores on ``[keep] evaluation``: the stage's own metrics, without clocks.

    Nothing of it gets into the log, or counts as an evaluation of the new task.
    """
    known = vars(trainer).get("known")
    if known is None:
        return {}
    handler = trainer.callback_handler
    told, handler.callbacks = handler.callbacks, []
    try:
        metrics: dict[str, float] = trainer.evaluate(eval_dataset=known)
    finally:
        handler.callbacks = told
    trainer.state.log_history.pop()
    named = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {key: value for key, value in named.items() if key not in _CLOCKS}
