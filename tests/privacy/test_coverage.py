"""What is covered, what goes to the loop and what is refused; exactness is in test_exactness."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn

from fedward.errors import UncoveredParameters
from fedward.privacy.coverage import coverage
from tests.privacy import tiny
from tests.privacy.exactness import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]


def test_what_is_clipped_how_is_said_in_a_sentence():
    model = METHODS["lora"][0]("fp32")
    assert str(coverage(model)) == "12 trainable tensors, clipped per unit in one backward pass"
    said = str(coverage(METHODS["ia3"][0]("fp32")))
    assert "one backward pass a unit, slower, because" in said
    assert "ia3_l.default belongs to a ParameterDict (and 5 more)" in said


def test_the_slow_way_is_said_aloud(caplog):
    model = METHODS["ia3"][0]("fp32")
    tiny.released(model, tiny.losses(tiny.records(9)))
    assert "one backward pass a unit, slower" in caplog.text


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_layers_that_remember_the_batch_are_refused(layer):
    with pytest.raises(UncoveredParameters, match="mixes the units of a batch"):
        coverage(sequential(layer))


def test_half_precision_and_nothing_at_all_are_refused():
    with pytest.raises(UncoveredParameters, match="must be float32"):
        coverage(sequential().to(torch.bfloat16))
    with pytest.raises(UncoveredParameters, match="no trainable parameter"):
        coverage(sequential().requires_grad_(False))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch compiling
def test_wrappers_that_touch_gradients_before_the_clip_are_refused():
    wraps: tuple[Any, ...] = (nn.DataParallel, torch.compile)
    for wrap in wraps:
        with pytest.raises(UncoveredParameters, match="give the model itself"):
            coverage(wrap(sequential()))


def test_shared_weights_go_to_the_loop():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, second)
    assert coverage(model).single_pass
    second.weight = first.weight
    assert "share a weight" in str(coverage(model))


def test_patched_subclassed_and_parametrized_layers_go_to_the_loop():
    class Fused(nn.Linear):
        pass

    assert "belongs to a Fused" in str(coverage(sequential(Fused(4, 4))))
    model = sequential()
    model[0].__dict__["forward"] = model[0].forward
    assert not coverage(model).single_pass
    model = sequential()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert not coverage(model).single_pass


def test_int8_outliers_and_experts_go_to_the_loop():
    int8 = Linear8bitLt(4, 4, has_fp16_weights=False, threshold=6.0)
    model = sequential(int8.requires_grad_(False))
    assert "int8 outliers over the whole batch" in str(coverage(model))
    int8.state.threshold = 0.0
    assert coverage(model).single_pass
    config = {"num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral = tiny.lora(tiny.causal("Mixtral", **config), target_modules=["q_proj"])
    assert "experts" in str(coverage(mixtral))
