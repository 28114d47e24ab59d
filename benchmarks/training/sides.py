"""The two sides: ``fedward train`` as its command runs it, and the script that TRL's pages show.

Both begin with files and end with a saved model and a checkpoint. Each imports its own libraries
when it is called, so that a process of one side holds nothing of the other's.
"""

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from training.work import Case, settings

Side = Callable[[Case, Path, Path, int], float]
"""Trains a case, from the folder with its files, into another one, some steps; gives the loss."""


def ours(case: Case, work: Path, out: Path, steps: int) -> float:
    """One job of one step."""
    from rich.console import Console

    from fedward.plan import Model
    from fedward.server.central.job import Data, Job, Reward, Step, Train, Tuner
    from fedward.server.central.running import run_job

    step: Any = {
        "name": "step",
        "stage": case.stage,
        "model": Model(path=str(work / ("judge" if case.stage == "reward" else "model"))),
        "data": Data(train=str(work / f"{case.stage}.jsonl")),
        "tuner": Tuner(method=case.method, arguments={"r": 8} if case.method == "lora" else {}),
        "train": Train(arguments={k: v for k, v in settings(case, steps).items() if k != "seed"}),
        "reward": Reward(column="word") if case.stage == "grpo" else None,
    }
    job = Job(name="job", steps=(Step(**step),))
    (report,) = run_job(job, out, Console(file=io.StringIO()))
    return float(report["training_loss"])


def trl(case: Case, work: Path, out: Path, steps: int) -> float:
    """Model, rows, configuration and trainer, as in TRL's documentation."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )

    trainer_class, config_class = _classes(case.stage)
    set_seed(0)
    judges = case.stage == "reward"
    base = work / ("judge" if judges else "model")
    kind: Any = AutoModelForSequenceClassification if judges else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = kind.from_pretrained(base, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    lines = (work / f"{case.stage}.jsonl").read_text().splitlines()
    args = config_class(
        output_dir=str(out / "checkpoints"),
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **settings(case, steps),
    )
    lora = LoraConfig(
        r=8, target_modules="all-linear", task_type="SEQ_CLS" if judges else "CAUSAL_LM"
    )
    with redirect_stdout(io.StringIO()):  # its log
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=tokenizer,
            peft_config=lora if case.method == "lora" else None,
            **({"reward_funcs": [_named]} if case.stage == "grpo" else {}),
        )
        result = trainer.train()
        trainer.save_model(str(out / "model"))
    return float(result.training_loss)


def _classes(stage: str) -> tuple[Any, Any]:
    if stage == "sft":
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        return SFTTrainer, SFTConfig
    if stage == "dpo":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer, DPOConfig
    if stage == "reward":
        from trl.trainer.reward_config import RewardConfig
        from trl.trainer.reward_trainer import RewardTrainer

        return RewardTrainer, RewardConfig
    if stage == "kto":
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        return KTOTrainer, KTOConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer, GRPOConfig


def _named(completions: list[str], word: list[str], **_: Any) -> list[float]:  # noqa: ANN401  # TRL's
    return [float(w in text) for text, w in zip(completions, word, strict=True)]


SIDES: Mapping[str, Side] = {"ours": ours, "trl": trl}
