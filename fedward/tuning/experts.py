"""Where a mixture of experts keeps its experts and the router that chooses among them."""

from typing import Literal

from torch import nn

from fedward.errors import ConfigurationError

Part = Literal["experts", "router"]


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts."""
    return any(_holds_experts(name) for name, _ in model.named_modules())


def part_of(model: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """The parameters of all experts, or of all routers, by name.

    A router is what stands beside ``experts`` under the name ``gate`` or ``router``, as in
    transformers' Mixtral, Qwen, OLMoE, GPT-OSS, DeepSeek and Llama 4.

    Raises:
        ConfigurationError: The model has none.
    """
    names = ("experts",) if part == "experts" else ("gate", "router")
    inside = tuple(
        f"{place.removesuffix('experts')}{name}."
        for place, _ in model.named_modules()
        if _holds_experts(place)
        for name in names
    )
    found = {name: p for name, p in model.named_parameters() if name.startswith(inside)}
    if not found:
        raise ConfigurationError(f"[tuner] the model has no {part}: expected a mixture of experts")
    return found


def train_only(model: nn.Module, part: Part) -> None:
    """Freeze all of a model but its experts, or its routers.

    Raises:
        ConfigurationError: The model has none.
    """
    trained = part_of(model, part)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)


def _holds_experts(place: str) -> bool:
    return place.rpartition(".")[2] == "experts"
