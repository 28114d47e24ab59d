"""Gradual unfreezing (Howard and Ruder 2018, arXiv 1801.06146, section 3.3).

The head and the top layers are trained from the first step, the next ones below them some steps
later, and so on down to the embeddings. The optimizer knows every parameter from the start; a
frozen one has no gradient, so that it has no state either, and no decay. What is open follows from
the step's number alone, so that a training resumed on either side of a boundary goes on alike.
"""

from math import ceil
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fedward.errors import ConfigurationError, require


def groups(model: nn.Module, layers: int) -> list[list[nn.Parameter]]:
    """A model's parameters in the order in which they are opened.

    First come the topmost layers with all that is above them, last the embeddings and whatever else
    is below the lowest layer (with the output layer where it has their weights).

    Args:
        model: transformers', with its layers in one list.
        layers: Of a group, 1 or more.

    Raises:
        ConfigurationError: No such list.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1,
    ...     num_hidden_layers=3, vocab_size=8)
    >>> [len(group) for group in groups(LlamaForCausalLM(config), 2)]
    [20, 9, 1]
    """
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ConfigurationError("[tuner] gradual: expected a model with its layers in one list")
    layer = {id(p): number for number, block in enumerate(lists[0]) for p in block.parameters()}
    opened: list[list[nn.Parameter]] = [[] for _ in range(ceil(depth / layers) + 1)]
    above = False
    for parameter in model.parameters():
        number = layer.get(id(parameter))
        above = above or number is not None
        if number is not None:
            opened[(depth - 1 - number) // layers].append(parameter)
        else:
            opened[0 if above else -1].append(parameter)
    return opened


class Unfreeze(TrainerCallback):
    """Opens one group after the other.

    Args:
        every: Steps from one group to the next, 1 or more.
        layers: Of a group, 1 or more.

    Raises:
        InvalidValue: One of them is something else.
    """

    def __init__(self, every: int, layers: int) -> None:
        for key, value in (("every", every), ("layers", layers)):
            require(type(value) is int and value >= 1, f"[tuner] {key}", value, "1 or more")
        self.every, self.layers = every, layers
        self.groups = list[list[nn.Parameter]]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401  # theirs
        """Find the groups; the optimizer has all of their parameters by now."""
        if args.world_size > 1:
            raise ConfigurationError("[tuner] gradual trains in one process only")
        self.groups = groups(given["model"], self.layers)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Open what the step's number says, and keep the rest frozen."""
        opened = 1 + state.global_step // self.every
        for number, group in enumerate(self.groups):
            for parameter in group:
                parameter.requires_grad_(number < opened)
