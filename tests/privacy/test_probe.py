from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedward.errors import UncoveredParameters
from fedward.privacy.probe import check_independence
from tests.privacy import tiny

RECORDS = [0, 1, 2]


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_honest_losses_pass_and_leave_the_model_alone(base):
    model = tiny.causal("Llama", attention_dropout=0.5)
    model = tiny.lora(model if base == "fp32" else tiny.quantized(model, base), lora_dropout=0.5)
    model.eval()
    check_independence(model, tiny.losses(tiny.records(3)), RECORDS)
    assert not model.training
    assert all(p.grad is None and "grad_sample" not in vars(p) for p in model.parameters())


def test_a_loss_over_the_tokens_of_the_batch_is_refused():
    ids = tiny.records(3)

    def loss(model: Any, rows: Any) -> Tensor:
        lengths = (ids[list(rows)] != tiny.PAD).sum(1)
        losses: Tensor = tiny.losses(ids)(model, rows) * lengths / lengths.sum()
        return losses

    with pytest.raises(UncoveredParameters, match="its own token count"):
        check_independence(tiny.lora(tiny.causal("Llama")), loss, RECORDS)


class Mixing(nn.Module):
    """Rows read their neighbour; shapes do not tell. It does so only in training, as dropout."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.layer, self.always = nn.Linear(4, 4), always

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        y: Tensor = self.layer(x)
        return y + y.roll(1, 0).tanh() if self.training or self.always else y


@pytest.mark.parametrize("always", [True, False])
def test_layers_that_mix_rows_are_refused(always):
    torch.manual_seed(0)
    data = torch.randn(3, 4)
    with pytest.raises(UncoveredParameters, match=r"alone|mixes the records"):
        check_independence(
            Mixing(always=always), lambda model, rows: model(data[list(rows)]).sum(1), RECORDS
        )


def test_time_before_batch_is_refused_even_where_the_lengths_agree():
    # The classic silent error: (time, batch, features) with as many steps as records.
    torch.manual_seed(0)
    data = torch.randn(3, 3, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UncoveredParameters, match="mixes the records"):
        check_independence(
            model, lambda model, rows: model(data[:, list(rows)]).pow(2).mean((0, 2)), RECORDS
        )


def test_one_record_shows_nothing():
    with pytest.raises(ValueError, match="at least two"):
        check_independence(tiny.causal("Llama"), tiny.losses(tiny.records(3)), [0])


class Projecting(nn.Module):
    """Its forward pass moves its own weight, as OFT's ``coft`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Shorten the weight, and scale by it."""
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


def test_a_forward_pass_that_moves_a_weight_is_refused():
    data = torch.randn(3, 4)
    with pytest.raises(UncoveredParameters, match="a forward pass moves"):
        check_independence(
            Projecting(),
            # Its losses agree, so that only the weight tells.
            lambda model, rows: model(data[list(rows)]).sum(1).tanh() * 0.0,
            RECORDS,
        )
