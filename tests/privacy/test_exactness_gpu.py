"""The step on a CUDA device, against brute force on the same device and noise on the CPU."""

from typing import Any

import peft
import pytest
import torch

from fedward.privacy.noise import SecureStream
from fedward.privacy.training import train_steps
from tests.privacy import exactness, tiny
from tests.privacy.exactness import METHODS, SINGLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
CELLS = [c for c in exactness.cells() if METHODS[c[0]][1] == SINGLE and c[1] != "int8"]


@pytest.mark.parametrize(("name", "base", "checkpointing"), CELLS)
def test_one_pass_is_exact_on_a_gpu(name, base, checkpointing):
    model = tiny.checkpointed(METHODS[name][0](base), checkpointing).to("cuda")
    loss = tiny.losses(tiny.records(9).to("cuda"))
    expected = tiny.clipped_sum(tiny.unit_gradients(model, tiny.UNITS, loss), 0.5)
    found, facts = tiny.released(model, loss, physical_batch=4)
    assert facts.single_pass
    # Products of other shapes add up in another order; a clip of 0.505 would be 1e-2 away.
    assert tiny.distance(expected, found) < 1e-4


def test_the_noise_is_the_streams_on_a_gpu_too():
    released: list[dict[str, Any]] = []
    for device in ("cpu", "cuda"):
        model = tiny.lora(tiny.causal("Llama")).to(device)
        loss = tiny.losses(tiny.records(9).to(device))
        found, _ = tiny.released(model, loss, tiny.mechanism(noise_multiplier=50.0))
        released.append({name: noised.cpu() for name, noised in found.items()})
    assert tiny.distance(*released) < 1e-4
    with pytest.raises(AssertionError):  # negative control: another key
        assert tiny.distance(released[0], {n: x.flip(0) for n, x in released[1].items()}) < 1e-4


def test_weights_move_and_an_adapter_comes_back_as_it_was_saved(tmp_path):
    # Opacus issue 820: LoRA updates on GPT-2's transposed layers went astray on CUDA.
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model: Any = peft.get_peft_model(tiny.causal("GPT2").to("cuda"), config)
    before = {name: p.detach().clone() for name, p in tiny.trainable(model).items()}
    ids = tiny.records(9).to("cuda")
    train_steps(
        model, tiny.UNITS, tiny.losses(ids),
        torch.optim.AdamW(list(tiny.trainable(model).values()), lr=1e-2),
        tiny.mechanism(noise_multiplier=0.1), steps=3, stream=SecureStream(tiny.KEY),
    )  # fmt: skip
    for name, parameter in tiny.trainable(model).items():
        assert float((parameter.detach() - before[name]).abs().max()) > 0
    model.eval().save_pretrained(tmp_path)
    again: Any = peft.PeftModel.from_pretrained(tiny.causal("GPT2").to("cuda"), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again.eval()(ids).logits)
