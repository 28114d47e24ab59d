"""One step made into TRL's trainer: model, tuner, data, rewards, and what the libraries miss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForTokenClassification, EarlyStoppingCallback, TrainerCallback

from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.server.central.checkpoints import exact
from fedward.server.central.data import read_dataset
from fedward.server.central.job import REWARDED, Step
from fedward.server.central.keeping import hold, keeping
from fedward.server.central.loading import device, open_base, open_trained
from fedward.server.central.manifest import Kind
from fedward.server.central.rewards import rule
from fedward.server.central.settings import load_class, settings
from fedward.server.central.unfreezing import Unfreeze
from fedward.tuning.experts import part_of, train_only
from fedward.tuning.methods import LORAPLUS, METHODS, peft_config, without_peft_noise
from fedward.tuning.models import HEADS, open_config, open_weights, quiet
from fedward.tuning.tuners import check_last_token, trainable


def kind_of(step: Step) -> Kind:
    """What a step makes."""
    kinds: dict[str, Kind] = {"reward": "reward", "classify": "classifier"}
    return kinds.get(step.stage, "language")


def build(
    step: Step,
    start: Path,
    folder: Path,
    *,
    judge: Path | None = None,
    teacher: Path | None = None,
    tuned: tuple[PeftModel, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:  # noqa: ANN401  # TRL's trainer
    """TRL's trainer of a step, ready to train.

    Every trained parameter is float32: TRL makes those over a quantised base bfloat16, in which
    small steps are lost (at a rate of 2e-5, 93 % of LoRA's A never moved in 50 steps).

    Args:
        step: Checked by :func:`fedward.server.central.validity.check_step`.
        start: The whole model that it starts from.
        folder: Where checkpoints go.
        judge: The reward model, where ``[reward]`` names one.
        teacher: Whom ``distill`` learns from.
        tuned: A model that has its tuner already, and its tokenizer; else both are made here.
        callbacks: Told how far it is.

    Raises:
        ConfigurationError: Something in the job that TRL or PEFT refuses.
        DataError: Records that the stage cannot use.
        ModelError: A model that cannot be loaded.
    """
    args = settings(step, folder)
    train, others = _rows(step)
    if args.eval_strategy != "no" and "evaluation" not in others:
        raise ConfigurationError("[train] eval_strategy needs [data] evaluation")
    steps = args.max_steps if args.max_steps > 0 else None
    kind = kind_of(step)
    task = TaskType.CAUSAL_LM if kind == "language" else TaskType.SEQ_CLS
    config = peft_config(step.tuner.method, step.tuner.arguments, task, steps=steps)
    watching = [*callbacks, *_own_callbacks(step)]
    transformers.set_seed(step.seed)
    model: Any
    model, tokenizer = (
        open_base(start, step.model, kind, _labels(step, train)) if tuned is None else tuned
    )
    check_last_token(model, step.tuner.method)
    given = _extra(step, start, judge, teacher)
    if tuned is not None:
        config = None
    part = METHODS[step.tuner.method].part
    if part is not None:
        part_of(model, part) if config else train_only(model, part)
    trainer_class = exact(load_class(step.stage, "trainer"))
    if step.keep is not None:
        trainer_class = keeping(trainer_class)
    try:
        with without_peft_noise():
            if step.stage == "orpo" and config is not None:
                # TRL's would round embeddings and output layer of a quantised base to bfloat16.
                model, config = get_peft_model(model, config), None
            trainer = trainer_class(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=others or None,
                processing_class=tokenizer,
                peft_config=config,
                callbacks=watching,
                **given,
            )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"TRL or PEFT refuses the job: {error}") from error
    trainer.remove_callback(transformers.PrinterCallback)
    prepared = dict(trainer.eval_dataset or {})
    trainer.eval_dataset = prepared.get("evaluation")
    for parameter in trainable(trainer.model).values():
        parameter.data = parameter.data.float()
    if step.tuner.method == "lora+":
        trainer.optimizer = _loraplus(trainer, step)
    _check_saving(trainer, step)
    if step.keep is not None:
        hold(trainer, step.keep, prepared)
    return trainer


def _rows(step: Step) -> tuple[Dataset, DatasetDict]:
    """The rows to learn, and by their use those to evaluate with and those to keep."""
    keep = (None, None) if step.keep is None else (step.keep.data, step.keep.evaluation)
    others = dict(zip(("evaluation", "old", "known"), (step.data.evaluation, *keep), strict=True))
    train = read_dataset(Path(step.data.train), step)
    found = DatasetDict()
    for name, path in others.items():
        if path is not None:
            found[name] = read_dataset(Path(path), step)
    return train, found


def _labels(step: Step, train: Dataset) -> list[str]:
    """The classes that are learned, sorted."""
    if step.stage != "classify":
        return []
    found = sorted(set(train["label"]))
    if len(found) < 2:
        raise DataError(f"{step.data.train}: expected two labels or more, got {', '.join(found)}")
    return found


def _own_callbacks(step: Step) -> list[TrainerCallback]:
    method, found = step.tuner.method, list[TrainerCallback]()
    if step.stop is not None:
        found.append(EarlyStoppingCallback(step.stop.patience, step.stop.threshold))
    if method == "adalora":
        found.append(_Allocate())
    if method == "gradual":
        found.append(Unfreeze(**{**METHODS[method].usual, **step.tuner.arguments}))
    return found


def _extra(step: Step, start: Path, judge: Path | None, teacher: Path | None) -> dict[str, Any]:
    """What the trainers of some stages take beside the rest."""
    given = dict[str, Any]()
    if teacher is not None:
        given["teacher_model"] = _frozen(*open_trained(teacher), "language")
    if step.reward is not None and judge is None:
        given["reward_funcs"] = [rule(step.reward)]
    elif judge is not None:
        model, tokenizer, kind = open_trained(judge)
        given["reward_funcs"] = [_frozen(model, tokenizer, kind, "reward")]
        given["reward_processing_classes"] = [tokenizer]
    if step.stage == "ppo":
        given["critic"] = _critic(step, start)
    return given


def _frozen(model: Any, tokenizer: Any, kind: Kind, wanted: Kind) -> Any:  # noqa: ANN401  # theirs
    if kind != wanted:
        raise ModelError(f"expected a {wanted} model, got a {kind} model")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval()


def _critic(step: Step, start: Path) -> Any:  # noqa: ANN401  # transformers' or PEFT's
    """A model that gives each position one number: the start's layers under a new head.

    It is trained whole where the policy is, and else by LoRA over a base held like the policy's.
    """
    with quiet():
        config, tokenizer = open_config(start)
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        config.num_labels = 1
        kind = AutoModelForTokenClassification
        critic = open_weights(kind, start, config, step.model, HEADS, device=device())
    if step.tuner.method in ("full", "gradual"):
        return critic
    lora = LoraConfig(
        task_type=TaskType.TOKEN_CLS, target_modules="all-linear", exclude_modules=[*HEADS]
    )
    with without_peft_noise():
        model = get_peft_model(critic, lora)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def _loraplus(trainer: Any, step: Step) -> torch.optim.Optimizer:  # noqa: ANN401  # TRL's
    args = trainer.args
    usual = METHODS["lora+"].usual[LORAPLUS]
    return create_loraplus_optimizer(
        trainer.model,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=step.tuner.arguments.get(LORAPLUS, usual),
        loraplus_weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def _check_saving(trainer: Any, step: Step) -> None:  # noqa: ANN401  # TRL's
    """Refuse checkpoints in the middle of a generation, whose completions nobody keeps."""
    args = trainer.args
    if step.stage not in REWARDED or args.save_strategy != "steps":
        return
    every = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    if every > 1 and args.save_steps % every:
        raise ConfigurationError(
            f"[train] save_steps = {args.save_steps}: expected a multiple of {every}, the steps "
            "that one generation serves, so that a resumed training is the same"
        )


class _Allocate(TrainerCallback):
    """Tells AdaLoRA of each step: nothing in transformers or TRL does, and no rank would fall."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401  # theirs
        """Score and prune after the update, while the gradients are there."""
        model = given["model"]
        inner: Any = model if isinstance(model, PeftModel) else model.module
        inner.base_model.update_and_allocate(state.global_step + 1)
