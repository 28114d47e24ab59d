"""Full training: it learns, resumes exactly, and refuses what it cannot resume."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedward.errors import ConfigurationError, InvalidValue, ModelError
from fedward.server.central.full import FullTraining, batch_of, train_full

SETTINGS = FullTraining(steps=40, batch_size=8, learning_rate=0.05, save_every=10)
INPUTS = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))
CLASSES = (INPUTS[:, 0] > INPUTS[:, 1]).long()


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


def loss(model: nn.Module, indices: Sequence[int]) -> Tensor:
    index = torch.tensor(indices)
    return nn.functional.cross_entropy(model(INPUTS[index]), CLASSES[index], reduction="none")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Killed(Exception):
    """Stands for a process that ends."""


def killed_at(step: int) -> Callable[[int, float], None]:
    def on_step(done: int, _loss: float) -> None:
        if done == step:
            raise Killed

    return on_step


def test_it_learns():
    model = build()
    losses = train_full(model, 50, loss, SETTINGS)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_trained_too():
    model = build()
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    train_full(model, 50, loss, SETTINGS)
    assert not torch.equal(before, frozen)


@pytest.mark.parametrize("step", [1, 9, 10, 15, 39, 40])
def test_a_killed_training_goes_on_exactly(tmp_path, step):
    whole = build()
    expected = train_full(whole, 50, loss, SETTINGS)
    file = tmp_path / "new" / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train_full(build(), 50, loss, SETTINGS, checkpoint=file, on_step=killed_at(step))
    resumed, steps = build(), []
    losses = train_full(
        resumed, 50, loss, SETTINGS, checkpoint=file, on_step=lambda done, _: steps.append(done)
    )
    assert losses == expected
    assert torch.equal(weights(resumed), weights(whole))
    assert steps == list(range(step // 10 * 10 + 1, 41))


def test_other_seeds_give_other_weights():
    one, two = build(), build()
    train_full(one, 50, loss, SETTINGS)
    train_full(two, 50, loss, dataclasses.replace(SETTINGS, seed=1))
    assert not torch.equal(weights(one), weights(two))


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = build().train()
    torch.manual_seed(3)
    train_full(model, 50, loss, dataclasses.replace(SETTINGS, steps=2))
    assert torch.equal(torch.rand(2), expected)


def test_tied_weights_survive_a_resumption(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6, bias=False)
            self.two = nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.one(x), self.two.weight)

    file = tmp_path / "checkpoint.safetensors"
    settings = dataclasses.replace(SETTINGS, steps=4, save_every=2)
    torch.manual_seed(0)
    whole = Tied()
    start = weights(whole).clone()
    train_full(whole, 50, loss, settings, checkpoint=file)
    resumed = Tied()
    assert train_full(resumed, 50, loss, settings, checkpoint=file)
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed.one.weight is resumed.two.weight
    assert not torch.equal(weights(resumed), start)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    train_full(build(), 50, loss, SETTINGS, checkpoint=file)
    train_full(build(), 50, loss, dataclasses.replace(SETTINGS, save_every=7), checkpoint=file)
    for model, examples, settings in (
        (build(), 50, dataclasses.replace(SETTINGS, learning_rate=0.1)),
        (build(), 49, SETTINGS),
        (nn.Linear(6, 2), 50, SETTINGS),
    ):
        with pytest.raises(ConfigurationError, match="another training"):
            train_full(model, examples, loss, settings, checkpoint=file)


def test_a_broken_checkpoint_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(b"not tensors")
    with pytest.raises(ConfigurationError, match="not a readable checkpoint"):
        train_full(build(), 50, loss, SETTINGS, checkpoint=file)


def test_a_loss_that_is_no_number_ends_the_training():
    def broken(model, indices):
        return loss(model, indices) * float("nan")

    with pytest.raises(ModelError, match="step 1 is nan: lower the learning rate"):
        train_full(build(), 50, broken, SETTINGS)


def test_no_examples_are_refused():
    with pytest.raises(ConfigurationError, match="at least one example"):
        train_full(build(), 0, loss, SETTINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("save_every", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_norm", float("inf")),
        ("warmup", 1.5),
        ("weight_decay", -0.1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(InvalidValue, match=key):
        dataclasses.replace(SETTINGS, **{key: value})


def test_every_example_is_used_once_before_any_is_used_again():
    batches = [batch_of(step, 50, SETTINGS) for step in range(13)]
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn[:50]) == sorted(drawn[50:100]) == list(range(50))
    assert drawn[:50] != drawn[50:100]
    assert all(len(batch) == 8 for batch in batches)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_of(0, 4, SETTINGS)) == [0, 0, 1, 1, 2, 2, 3, 3]
