"""Random Llamas under LoRA of several sizes, with a batch of random records."""

from dataclasses import dataclass
from typing import Any

import peft
import torch
from bitsandbytes.nn.modules import LinearNF4, Params4bit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedward.tuning.objectives import Encoded, Example, collate, loss_per_example

CHECKPOINTING = ("none", "reentrant", "non-reentrant")


@dataclass(frozen=True, kw_only=True)
class Size:
    """One shape of model and batch.

    Args:
        hidden: Width; the inner layers are 8/3 of it, in steps of 64.
        layers: Transformer blocks.
        heads: Attention heads.
        vocabulary: Tokens.
        length: Tokens of a record.
        batch: Records of a step, each a unit.
        rank: LoRA's r, on every linear layer of the blocks.
        inner: Width of the inner layers where it is another one.
        groups: Key-value heads where they are fewer than ``heads``.
        quantize: ``none`` or ``nf4``; with ``nf4`` the rest is bfloat16.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    rank: int
    inner: int | None = None
    groups: int | None = None
    quantize: str = "none"


SIZES = {
    "xs": Size(hidden=128, layers=4, heads=4, vocabulary=4096, length=128, batch=8, rank=8),
    "s": Size(hidden=256, layers=6, heads=4, vocabulary=8192, length=128, batch=8, rank=8),
    "m": Size(hidden=512, layers=8, heads=8, vocabulary=16384, length=256, batch=4, rank=16),
    # Llama 3.1 8B's shape; for a GPU.
    "8b": Size(
        hidden=4096, layers=32, heads=32, vocabulary=128256, length=512, batch=8, rank=16,
        inner=14336, groups=8, quantize="nf4",
    ),
}  # fmt: skip


def build(size: Size, checkpointing: str, device: str) -> Any:  # noqa: ANN401  # PEFT has no types
    """A Llama with random weights under LoRA, the same for every way, in train mode."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner or -(-size.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups or size.heads,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if size.quantize == "none" else torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if size.quantize == "nf4":
        _to_nf4(model, device)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=size.rank, lora_alpha=2 * size.rank, target_modules="all-linear"
    )
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing != "none":
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable(
            {"use_reentrant": checkpointing == "reentrant"}
        )
    return model.train()


def _to_nf4(model: nn.Module, device: str) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            new: Any = LinearNF4(  # type: ignore[no-untyped-call]  # bitsandbytes
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            new.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]  # made in __new__
            setattr(parent, name, new.to(device))


def records(size: Size) -> Encoded:
    """As many records as a batch has, of random tokens, all learned."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, size.vocabulary, (size.batch, size.length), generator=generator)
    rows = [tuple(row) for row in ids.tolist()]
    return Encoded(
        examples=tuple(Example(tokens=row, targets=row) for row in rows), padding=0, classify=False
    )


class Losses:
    """The loss of each record by itself, as sites compute it.

    Args:
        encoded: All records.
        device: Where the model is.
    """

    def __init__(self, encoded: Encoded, device: str) -> None:
        self._encoded, self._device = encoded, device

    def __call__(self, model: nn.Module, numbers: Any) -> Tensor:  # noqa: ANN401  # a sequence
        """Losses of these records, shape ``(records,)``."""
        return loss_per_example(model, collate(self._encoded, numbers, self._device))
