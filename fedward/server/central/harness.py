"""A language model on a task of lm-evaluation-harness, which is an extra.

A task is not data but code: its YAML may name Python functions, and its templates are not confined.
"""

from pathlib import Path
from typing import Any

from fedward.errors import ConfigurationError, ModelError
from fedward.server.central.opening import Opened


def run_harness(opened: Opened, task: str, folder: Path, *, batch_size: int) -> dict[str, Any]:
    """Evaluate by a task that lies on this machine.

    Args:
        opened: A language model.
        task: The task's name.
        folder: Its YAML, and that of others; the harness's own tasks are not known here, because
            their data would be fetched.
        batch_size: Requests at a time, 1 or more.

    Returns:
        ``task``, ``rows`` and ``figures``: name to ``value`` and, where it has one, ``error``,
        its standard error.

    Raises:
        ConfigurationError: No such folder or task, or one that cannot be run.
        ModelError: The model is no language model.
    """
    # An extra, so that a type checker may miss it.
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if opened.kind != "language":
        raise ModelError(f"{opened.name}: a {opened.kind} model; the harness asks language models")
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such folder of tasks")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if task not in manager.all_tasks:
        known = ", ".join(manager.all_tasks) or "no task"
        raise ConfigurationError(f"--harness {task}: {folder} has {known}")
    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=model, tasks=[task], task_manager=manager, log_samples=False, verbosity="ERROR"
        )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigurationError(f"--harness {task}: {type(error).__name__}: {error}") from error
    measured = {
        name.partition(",")[0]: value
        for name, value in found["results"][task].items()
        if isinstance(value, int | float) and "," in name
    }
    return {
        "task": task,
        "rows": found["n-samples"][task]["effective"],
        "figures": {
            name: {"value": value}
            | ({"error": measured[f"{name}_stderr"]} if f"{name}_stderr" in measured else {})
            for name, value in measured.items()
            if not name.endswith("_stderr")
        },
    }
