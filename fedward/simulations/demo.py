"""The built-in demo: its plan, its notes and its base model, made once and then kept."""

import dataclasses
import os
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console

from fedward import typed_toml
from fedward.plan import Plan
from fedward.simulations.base_model import SETTINGS, base_model
from fedward.simulations.notes import generate, write_folder

KILLED = "summit"
"""The hospital that dies in the middle of round 2."""


def demo_plan() -> Plan:
    """The demo's plan, without a base model."""
    with resources.as_file(resources.files("fedward.simulations") / "demo.toml") as path:
        return typed_toml.load(Plan, path)


def prepare_demo(seed: int, console: Console) -> tuple[Plan, Path, str]:
    """Make what the demo needs, or find it where it was kept.

    Args:
        seed: Of notes, base model and adapter; 0 or more.
        console: Shows the training of the base model.

    Returns:
        The plan, the folder with the notes, and the hospital that the demo kills.
    """
    torch.set_num_threads(1)  # layers of width 64: threads would wait for each other
    cache = _cache_folder()
    plan = dataclasses.replace(demo_plan(), seed=seed)
    data = cache / f"notes-{seed}"
    write_folder(generate(seed), data)
    with console.status("base model: reading public text") as status:

        def show(done: int, loss: float) -> None:
            status.update(f"base model: step {done} of {SETTINGS.steps}, loss {loss:.2f}")

        folder = base_model(cache, plan, seed=seed, on_step=show)
    model = dataclasses.replace(plan.model, path=str(folder))
    return dataclasses.replace(plan, model=model), data, KILLED


def _cache_folder() -> Path:
    """Where bases and notes are kept between demos: ``$XDG_CACHE_HOME/fedward``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "fedward"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
