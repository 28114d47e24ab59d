"""``[tuner]`` of a plan: which part of the model sites train, and which parts they cannot."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedward import typed_toml
from fedward.errors import require

LORA = ("lora", "rslora", "dora", "lora+")
"""Methods whose update is a product of A and B, as every scheme but ``fedavg`` needs it."""

METHODS = (
    *LORA,
    "houlsby",
    "pfeiffer",
    "ia3",
    "vera",
    "oft",
    "bitfit",
    "prompt",
    "prefix",
    "p-tuning",
)
"""What sites train, each with privacy and without."""

UNMERGEABLE = ("houlsby", "pfeiffer", "bitfit", "prompt", "prefix", "p-tuning")
"""Those of them whose update cannot be added to the base's weights."""

_EXPERTS = "another method: a router sends tokens by what all of them are"
REFUSED = {
    "qlora": "'lora', and quantize = 'nf4' in [model]",
    "full": (
        "a method of fewer numbers: a round would send every weight, and the noise grows with "
        "their number (fedward train has 'full'; modules_to_save trains whole layers)"
    ),
    "gradual": "a method that trains the same tensors in every round: only those can be summed",
    "pissa": (
        "another method: it changes the base by an SVD, whose last bits differ between machines, "
        "so that no two sites would have the same base"
    ),
    "adalora": (
        "another method: each site would deal out ranks by its own patients' gradients, which "
        "nobody clips, and ranks that differ have no mean"
    ),
    "experts": _EXPERTS,
    "router": _EXPERTS,
    "lora-experts": _EXPERTS,
    "lora-router": _EXPERTS,
}
"""Methods of central training that sites refuse: what is expected in their place, and why."""


def _is_plain(value: object) -> bool:
    """Whether JSON carries a value and gives it back equal: no dates, sets, tuples or NaN."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or (isinstance(value, bool | int | float | str) and value == value)


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """``[tuner]``: the PEFT method; those of its keys that are safe at a site, unrenamed.

    Args:
        method: ``lora`` (over a quantized base it is QLoRA), ``rslora``, ``dora``, ``lora+``,
            ``houlsby``, ``pfeiffer``, ``ia3``, ``vera``, ``oft``, ``bitfit``, ``prompt``,
            ``prefix`` or ``p-tuning``; other methods are refused, with the reason.
        arguments: PEFT's keys of the method, for example ``r`` and ``target_modules``.
        ranks: Site name to the rank that it trains, 1 to ``r``: the first components of the
            adapter. Whoever is not named trains all. With scheme ``sketch`` only.
        personal: Names of modules or tensors, like ``score``, ``lora_B`` or ``layers.3``, whose
            trained numbers stay at each site: they are trained there, and never sent or summed.
    """

    method: str = "lora"
    ranks: Mapping[str, int] | None = field(
        default=None, hash=False, metadata={typed_toml.LATER: True}
    )
    personal: tuple[str, ...] = field(default=(), metadata={typed_toml.LATER: True})
    arguments: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={typed_toml.REST: True}
    )

    def __post_init__(self) -> None:
        """Check every limit."""
        allowed = REFUSED.get(self.method, "one of " + ", ".join(map(repr, METHODS)))
        require(self.method in METHODS, "method", self.method, allowed)
        plain = all(re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) for name in self.personal)
        allowed = "plain names, of letters, digits, '.', '_' and '-'"
        require(plain, "personal", list(self.personal), allowed)
        for key, value in self.arguments.items():
            require(key != "method", "arguments", key, "a key of PEFT")
            require(_is_plain(value), key, value, "text, numbers, true, false, or lists of them")
        if self.ranks is not None:
            alone = self.method in LORA and not self.personal
            require(alone, "ranks", dict(self.ranks), "none with this method, or beside personal")
            most = self.arguments.get("r", 8)  # PEFT's default
            one = {"rank_pattern", "alpha_pattern"}.isdisjoint(self.arguments)
            allowed = "one r for all layers, without rank_pattern or alpha_pattern"
            require(one and type(most) is int, "ranks", dict(self.ranks), allowed)
            for name, rank in self.ranks.items():
                require(1 <= rank <= most, f"ranks.{name}", rank, f"1 to r = {most}")
