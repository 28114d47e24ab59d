"""Gradual unfreezing: what is open when, and that a resumed training goes on alike."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from fedward.errors import InvalidValue
from fedward.server.central.job import Tuner
from fedward.server.central.stages import build
from fedward.server.central.unfreezing import Unfreeze, groups
from tests.server.central.rig import build_base, make_step

EVERY = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model", layers=3)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Six steps that open a group every other step: what each parameter was after each of them."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = start(base, folder)
    seen: list[dict[str, Any]] = [copy(trainer)]
    states: list[int] = []

    class See(Unfreeze):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(copy(trainer))
            states.append(len(trainer.optimizer.state_dict()["state"]))

    trainer.callback_handler.callbacks.append(See(EVERY, 1))
    trainer.train()
    return folder, trainer, seen, states


def start(base: Any, folder: Any, method: str = "gradual") -> Any:
    train = {"max_steps": 7, "save_steps": 1, "save_total_limit": 10}
    tuner = Tuner(method=method, arguments={"every": EVERY} if method == "gradual" else {})
    return build(make_step(base, folder, "sft", tuner=tuner, train=train), base, folder / "saved")


def copy(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(before: Any, after: Any) -> set[str]:
    """Layers, or what is above and below them, that a step changed."""
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {n.split(".")[2] if "layers" in n else n.split(".")[-2] for n in names}


def test_a_group_is_opened_every_other_step_from_the_top(trained):
    _, _, seen, _ = trained
    top = {"2", "norm", "lm_head"}
    expected = [top] * 2 + [top | {"1"}] * 2 + [top | {"1", "0"}] * 2
    expected.append(top | {"1", "0", "embed_tokens"})
    assert [moved(*pair) for pair in pairwise(seen)] == expected


def test_full_training_moves_all_at_once(base, tmp_path):
    trainer = start(base, tmp_path, "full")
    before = copy(trainer)
    trainer.args.max_steps = 1
    trainer.train()
    assert moved(before, copy(trainer)) == {"2", "1", "0", "norm", "lm_head", "embed_tokens"}


def test_what_is_frozen_has_no_optimizer_state(trained):
    _, trainer, _, states = trained
    sizes = [len(group) for group in groups(trainer.model, 1)]
    opened = [sum(sizes[: 1 + step // EVERY]) for step in range(7)]
    assert states == opened
    assert opened[0] < opened[-1] == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_it_is_resumed_alike_on_either_side_of_a_boundary(base, trained, tmp_path, step):
    folder, whole, _, _ = trained
    resumed = start(base, tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / "saved" / f"checkpoint-{step}"))
    expected, found = copy(whole), copy(resumed)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize("given", [{"every": 0}, {"layers": 0}, {"every": 1.5}, {"layers": True}])
def test_a_schedule_that_is_none_is_refused(given):
    with pytest.raises(InvalidValue, match="1 or more"):
        Unfreeze(**{"every": 1, "layers": 1, **given})
