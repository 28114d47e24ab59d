"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, 2005.00247).

PEFT has none. A layer's output y becomes ``y + scale * B(gelu(A(y)))``; A and B are the linear
layers that PEFT calls ``lora_A`` and ``lora_B``, so that saving, loading and the clip of DP-SGD
treat them as LoRA's. B starts at zero, so that the start computes what the base does.
"""

from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import gelu

HOULSBY = r".*(\.o_proj|\.down_proj|\.out_proj|\.fc2|\.output\.dense|\.c_proj)"
"""Layers at the end of attention and of the feed-forward part: Llama's, OPT's, BERT's, GPT-2's."""

PFEIFFER = r".*(\.down_proj|\.fc2|(?<!attention)\.output\.dense|\.mlp\.c_proj)"
"""Layers at the end of the feed-forward part."""


class Bottleneck(nn.Module, LoraLayer):
    """A layer with a bottleneck behind it; PEFT builds it.

    Args:
        base_layer: The frozen linear layer, of any precision; its output has shape (..., n).
        adapter_name: PEFT's name of the adapter.
        config: PEFT's configuration: width ``r``, ``lora_alpha``, ``lora_dropout``.
        r: Width of the bottleneck, 1 or more.
        lora_alpha: The output's scale times ``r``.
        **_: Whatever else PEFT says of a layer.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **_: Any,  # noqa: ANN401  # PEFT's
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.in_features = self.out_features  # A reads what the layer gives
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  # the layer's
        """The layer's output with the adapter's added, shape (..., n)."""
        y = cast("Tensor", self.base_layer(x, *args, **kwargs))
        if self.disable_adapters:
            return y
        out = y
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            down, up = self.lora_A[name], self.lora_B[name]
            inner = gelu(down(self.lora_dropout[name](y.to(cast("Tensor", down.weight).dtype))))
            out = out + (self.scaling[name] * up(inner)).to(y.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is not linear cannot be added to a weight.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a bottleneck adapter is not linear: it cannot be merged")

    def unmerge(self) -> None:
        """Do nothing, because nothing was merged."""


def put_behind(config: PeftConfig) -> None:
    """Make PEFT put bottlenecks where this configuration would put LoRA.

    The mapping is not saved with an adapter: whoever loads one has to call this again.
    """
    # PEFT's way for layers of one's own; it says that the name may change.
    cast("Any", config)._register_custom_module({nn.Module: Bottleneck})
