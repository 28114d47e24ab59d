"""Tiny real models and a brute-force reference that the engine is held to."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from bitsandbytes.nn.modules import Linear8bitLt, LinearNF4, Params4bit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism
from fedward.privacy.training import TrainingFacts, train_steps

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 32,
}
KEY = bytes(32)
UNITS = [[0], [1, 2], [3, 4, 5], [6], [7, 8]]
EVERYBODY = Mechanism(
    sampling_rate=1.0, normaliser=1.0, clip=0.5, noise_multiplier=0.0, records_per_unit=3
)


def mechanism(**changes: Any) -> Mechanism:
    """:data:`EVERYBODY` with changes."""
    return dataclasses.replace(EVERYBODY, **changes)


PAD = 0
LENGTH = 7


def causal(family: str, **changes: Any) -> nn.Module:
    """A causal language model with random weights: ``Llama``, ``Qwen2`` or ``GPT2``."""
    torch.manual_seed(1)
    if family == "GPT2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
        sizes |= {"n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = SIZES | {"num_key_value_heads": 2}
    quiet = {
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | quiet | changes)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model: nn.Module = getattr(transformers, family + head)(config)
    return model


def classifier(**changes: Any) -> nn.Module:
    """A BERT with a classification head over three classes and without dropout."""
    torch.manual_seed(1)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    config = transformers.BertConfig(**SIZES | quiet | changes)
    return transformers.BertForSequenceClassification(config)


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """The same model with its inner linear layers in NF4 or int8, as bitsandbytes holds them."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or name in {"lm_head", "classifier", "score"}:
                continue
            bias = layer.bias is not None
            if kind == "nf4":
                new: Any = LinearNF4(layer.in_features, layer.out_features, bias, torch.float32)  # type: ignore[no-untyped-call]  # bitsandbytes
                new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]  # made in __new__
            else:
                new = Linear8bitLt(
                    layer.in_features, layer.out_features, bias, has_fp16_weights=False
                )
                new.load_state_dict(layer.state_dict(), strict=True)
            if bias:
                new.bias = nn.Parameter(layer.bias.data.clone())
            setattr(parent, name, new.to("cpu"))
    return model


def lora(model: Any, **changes: Any) -> Any:
    """The model with LoRA of rank 4 whose B is not zero, so that A has gradients."""
    given: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(**given | changes))


def checkpointed(model: Any, how: str) -> Any:
    """The model with ``reentrant``, ``non-reentrant`` or no gradient checkpointing."""
    if how != "none":
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
    return model


def released(
    model: Any,
    loss: Any,
    mechanism: Mechanism = EVERYBODY,
    units: Any = UNITS,
    **options: Any,
) -> tuple[dict[str, Tensor], TrainingFacts]:
    """What one step of a copy of the model moves along, by parameter."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(list(trainable(model).values()), lr=1.0)
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in trainable(model).items():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()

    optimizer.register_step_pre_hook(keep)
    facts = train_steps(
        model, units, loss, optimizer, mechanism, steps=1, stream=SecureStream(KEY), **options
    )
    return found, facts


def records(n: int, *, seed: int = 0) -> Tensor:
    """Token ids of ``n`` records of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SIZES["vocab_size"], (n, LENGTH), generator=generator)
    for row, length in enumerate(torch.randint(3, LENGTH + 1, (n,), generator=generator)):
        ids[row, int(length) :] = PAD
    return ids


def losses(ids: Tensor) -> Callable[[nn.Module, Any], Tensor]:
    """A loss function over these records: each record's own token mean, or its class."""

    def loss(model: nn.Module, numbers: Any) -> Tensor:
        rows = ids[list(numbers)]
        logits = model(input_ids=rows, attention_mask=(rows != PAD).long()).logits
        if logits.dim() == 2:
            return cross_entropy(logits, rows[:, 0] % logits.shape[1], reduction="none")
        logits = logits[:, -rows.shape[1] :]  # prompt tuning puts virtual tokens in front
        targets = rows.masked_fill(rows == PAD, -100)[:, 1:]
        each = cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100
        )
        return each.sum(1) / (targets != -100).sum(1)

    return loss


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unit_gradients(model: nn.Module, units: Any, loss: Any) -> list[dict[str, Tensor]]:
    """For each unit the mean of its records' gradients, one record at a time by plain autograd."""
    model = copy.deepcopy(model).train()
    gradients = []
    for unit in units:
        total = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
        for record in unit:
            model.zero_grad(set_to_none=True)
            loss(model, [record]).sum().backward()
            for name, p in trainable(model).items():
                total[name] += 0.0 if p.grad is None else p.grad / len(unit)
        gradients.append(total)
    return gradients


def clipped_sum(gradients: list[dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    """The sum of the units' gradients, each scaled to at most ``clip`` in L2."""
    total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
    for unit in gradients:
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in unit.values()))
        for name, gradient in unit.items():
            total[name] += gradient * min(1.0, clip / norm)
    return total


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference, relative to the largest entry of the first."""
    largest = max(float(x.abs().max()) for x in one.values())
    return max(float((one[n] - other[n]).abs().max()) for n in one) / largest
