"""Every tuner on every base with every checkpointing, against one record at a time.

python -m tests.privacy.exactness               # measure, and print the table
python -m tests.privacy.exactness --write       # and put it into docs/dp-engine.md
"""

import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.privacy import tiny

PAGE = Path(__file__).parents[2] / "docs" / "dp-engine.md"
BASES = ("fp32", "nf4", "int8")
CHECKPOINTING = ("none", "reentrant", "non-reentrant")
TOLERANCE = 2e-6
NOWHERE = "-"

TARGETS = ["q_proj", "v_proj", "down_proj"]
INNER = r"^(?!.*embed)"
SINGLE, LOOP = "one pass", "unit by unit"


def wrapped(config: peft.PeftConfig, family: str = "Llama", **changes: Any) -> Any:
    """Makes a model with a PEFT method whose parameters are not at their start."""

    def make(base: str) -> Any:
        model = tiny.classifier() if family == "Bert" else tiny.causal(family, **changes)
        model = model if base == "fp32" else tiny.quantized(model, base)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        for parameter in tiny.trainable(model).values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        return model

    return make


def trained(family: str, which: str = "", **changes: Any) -> Any:
    """Makes a model of which the parameters whose names match are trained themselves."""

    def make(base: str) -> Any:
        model = tiny.classifier() if family == "Bert" else tiny.causal(family, **changes)
        model = model if base == "fp32" else tiny.quantized(model, base)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(re.search(which, name) is not None)
        return model

    return make


def of(config: Any, **changes: Any) -> Any:
    return config(task_type="CAUSAL_LM", **changes)


def lora(**changes: Any) -> Any:
    return of(peft.LoraConfig, r=4, **{"target_modules": TARGETS} | changes)


class Bottleneck(nn.Module):
    """A layer with a bottleneck adapter behind it (Houlsby et al. 2019, arXiv 1902.00751)."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter's added."""
        y = self.layer(x)
        added: Tensor = y + self.up(torch.relu(self.down(y)))
        return added


def adapted(base: str) -> Any:
    """A Llama with bottleneck adapters behind its inner layers, as modules of its own."""
    model: Any = tiny.causal("Llama")
    model = model if base == "fp32" else tiny.quantized(model, base)
    model.requires_grad_(False)
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp = Bottleneck(layer.mlp, tiny.SIZES["hidden_size"])
    return model


def without_dropout(make: Any) -> Any:
    """The same with every dropout set to zero, as a site that trains privately must."""

    def quiet(base: str) -> Any:
        model = make(base)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return quiet


def resting(make: Any, part: str) -> Any:
    """The same with those parameters frozen whose name has a part."""

    def rested(base: str) -> Any:
        model = make(base)
        for name, parameter in tiny.trainable(model).items():
            parameter.requires_grad_(part not in name)
        return model

    return rested


FULL, BOTH, ALL = ("fp32",), ("fp32", "nf4"), ("fp32", "nf4", "int8")
METHODS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "lora": (wrapped(lora()), SINGLE, ALL),
    "lora qwen2": (wrapped(lora(), "Qwen2"), SINGLE, BOTH),
    "lora gpt2": (
        wrapped(lora(target_modules=["c_attn"], fan_in_fan_out=True), "GPT2"), SINGLE, FULL,
    ),
    "lora bert": (
        wrapped(
            peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), "Bert"
        ), SINGLE, BOTH,
    ),
    "lora, dropout zeroed": (without_dropout(wrapped(lora(lora_dropout=0.5))), SINGLE, BOTH),
    "lora, A alone": (resting(wrapped(lora()), ".lora_B."), SINGLE, ALL),
    "rslora": (wrapped(lora(use_rslora=True)), SINGLE, BOTH),
    "pissa": (wrapped(lora(init_lora_weights="pissa")), SINGLE, FULL),
    "lora bias": (
        wrapped(lora(lora_bias=True, target_modules=["q_proj"]), "Qwen2"), SINGLE, BOTH,
    ),
    "lora + biases": (wrapped(lora(bias="all"), "Qwen2"), SINGLE, BOTH),
    "lora + head": (wrapped(lora(modules_to_save=["lm_head"])), SINGLE, BOTH),
    "lora + tied head": (
        wrapped(lora(modules_to_save=["lm_head"]), tie_word_embeddings=True), SINGLE, FULL,
    ),
    "head alone bert": (trained("Bert", r"^classifier"), SINGLE, BOTH),
    "bottleneck adapters": (adapted, SINGLE, ALL),
    "ln-tuning": (wrapped(of(peft.LNTuningConfig)), SINGLE, BOTH),
    "bitfit qwen2": (trained("Qwen2", r"bias$"), SINGLE, ALL),
    "bitfit bert": (trained("Bert", r"bias$"), SINGLE, ALL),
    "full but embeddings": (trained("Llama", INNER), SINGLE, FULL),
    "full but embeddings qwen3": (trained("Qwen3", INNER, head_dim=8), SINGLE, FULL),
    "full but embeddings gemma": (trained("Gemma", INNER, head_dim=8), SINGLE, FULL),
    "full but embeddings bert": (trained("Bert", r"^(?!.*_embeddings)"), SINGLE, FULL),
    "full but embeddings gpt2": (trained("GPT2", r"\.h\.|ln_f"), SINGLE, FULL),
    "full": (trained("Llama"), LOOP, FULL),
    "full tied": (trained("Llama", tie_word_embeddings=True), LOOP, FULL),
    "dora": (wrapped(lora(use_dora=True)), LOOP, BOTH),
    "lora embed_tokens": (
        wrapped(lora(target_modules=[*TARGETS, "embed_tokens"])), LOOP, FULL,
    ),
    "lora token indices": (wrapped(lora(trainable_token_indices=[1, 2])), LOOP, FULL),
    "adalora": (
        wrapped(of(peft.AdaLoraConfig, target_modules=TARGETS, init_r=4, total_step=9)), LOOP, BOTH,
    ),
    "ia3": (
        wrapped(of(peft.IA3Config, target_modules=TARGETS, feedforward_modules=["down_proj"])),
        LOOP, BOTH,
    ),
    "vera": (wrapped(of(peft.VeraConfig, r=4, target_modules=["q_proj", "o_proj"])), LOOP, BOTH),
    "loha": (wrapped(of(peft.LoHaConfig, r=4, target_modules=TARGETS)), LOOP, FULL),
    "lokr": (wrapped(of(peft.LoKrConfig, r=4, target_modules=TARGETS)), LOOP, FULL),
    "oft": (wrapped(of(peft.OFTConfig, oft_block_size=8, target_modules=["q_proj"])), LOOP, BOTH),
    "prompt": (wrapped(of(peft.PromptTuningConfig, num_virtual_tokens=3)), LOOP, BOTH),
    "prefix": (wrapped(of(peft.PrefixTuningConfig, num_virtual_tokens=3)), LOOP, BOTH),
    "prefix + projection": (
        wrapped(
            of(peft.PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True,
               encoder_hidden_size=8)
        ), LOOP, BOTH,
    ),
    "p-tuning mlp": (
        wrapped(of(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8)),
        LOOP, BOTH,
    ),
    "p-tuning lstm": (
        wrapped(
            of(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8,
               encoder_reparameterization_type="LSTM", encoder_num_layers=1, encoder_dropout=0.0)
        ), LOOP, BOTH,
    ),
}  # fmt: skip


def error(name: str, base: str, checkpointing: str) -> float:
    """The largest error of a step with about half of the units clipped, however it is cut.

    Raises:
        AssertionError: The step was not taken in the way that :data:`METHODS` says, or a clip that
            is a thousandth off would not have been noticed.
    """
    make, how, _ = METHODS[name]
    model = tiny.checkpointed(make(base), checkpointing)
    recomputes = any(vars(module).get("gradient_checkpointing") for module in model.modules())
    assert recomputes == (checkpointing != "none")
    loss = tiny.losses(tiny.records(9))
    gradients = tiny.unit_gradients(model, tiny.UNITS, loss)
    norms = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in u.values())) for u in gradients]
    clip = math.sqrt(sorted(norms)[1] * sorted(norms)[2])  # three of five are clipped
    expected = tiny.clipped_sum(gradients, clip)
    errors = []
    for physical_batch in (3, 32):
        found, facts = tiny.released(
            model, loss, tiny.mechanism(clip=clip), physical_batch=physical_batch
        )
        assert facts.single_pass == (how == SINGLE)
        assert facts.clipped == 0.6
        errors.append(tiny.distance(expected, found))
        assert tiny.distance(tiny.clipped_sum(gradients, 1.001 * clip), found) > 1e-4
    return max(errors)


def cells() -> Iterator[tuple[str, str, str]]:
    """Every method, base and checkpointing that go together."""
    for name, (_, _, bases) in METHODS.items():
        for base in bases:
            for checkpointing in CHECKPOINTING:
                # PEFT switches checkpointing off for virtual tokens.
                virtual = name.startswith(("prefix", "p-tuning", "prompt"))
                if checkpointing == "none" or not virtual:
                    yield name, base, checkpointing


def table(errors: dict[tuple[str, str, str], float]) -> str:
    """The page's table: errors without, with reentrant and with non-reentrant checkpointing."""
    lines = ["| trained | way | fp32 | NF4 | int8 |", "|---|---|---|---|---|"]
    for name, (_, how, _) in METHODS.items():
        found = []
        for base in BASES:
            values = [errors.get((name, base, way)) for way in CHECKPOINTING]
            texts = [NOWHERE if value is None else f"{value:.0e}" for value in values]
            found.append(NOWHERE if set(texts) == {NOWHERE} else ", ".join(texts))
        lines.append(f"| {name} | {how} | {' | '.join(found)} |")
    return "\n".join(lines)


def on_page() -> str:
    """The table that the page has."""
    (found,) = re.findall(r"^\| trained .*?(?=\n\n)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def main() -> None:
    """Measure every cell and print or write the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    errors = {}
    for cell in cells():
        errors[cell] = error(*cell)
        sys.stderr.write(f"{', '.join(cell)}: {errors[cell]:.0e}\n")
        if not errors[cell] < TOLERANCE:
            sys.exit("not exact")
    worst = max(errors.values())
    new = table(errors)
    sys.stdout.write(f"{new}\n\n{len(errors)} cells, largest error {worst:.1e}\n")
    if "--write" in sys.argv:
        text = PAGE.read_text().replace(on_page(), new)
        summary = rf"**{len(errors)} cells, largest error {worst:.0e}**"
        PAGE.write_text(re.sub(r"\*\*\d+ cells, largest error .*?\*\*", summary, text))


if __name__ == "__main__":
    main()
