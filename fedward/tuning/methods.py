"""The tuners: each name with PEFT's class, what the name fixes, and what is used unless said.

One table for the sites and for central training. A key of PEFT keeps PEFT's name.
"""

import dataclasses
import difflib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
)

from fedward.errors import ConfigurationError
from fedward.tuning.bottleneck import HOULSBY, PFEIFFER, put_behind
from fedward.tuning.experts import Part

LORAPLUS = "loraplus_lr_ratio"
"""The one key that is the optimizer's and not PEFT's: the rate of B over that of A."""

FOLLOWS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
"""Fields of PEFT that follow from the rest of a plan or job."""

_CLOSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    "total_step",
    "use_bdlora",
    "velora_config",
)
"""Fields of PEFT that TOML cannot say, that name a module to import, that read other files, or that
follow from the number of steps."""

_ALL: Mapping[str, Any] = {"target_modules": "all-linear"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One tuner.

    Args:
        what: What it trains, in one line.
        source: The paper.
        config: PEFT's class; None trains every parameter.
        fixed: Fields that the name stands for; the user cannot set them.
        usual: Fields used unless the user says something else.
        part: What alone of a mixture of experts is trained, where it is not all.
        mergeable: Whether its update can be added to the base's weights.
    """

    what: str
    source: str
    config: type[PeftConfig] | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    part: Part | None = None
    mergeable: bool = True

    @property
    def prompts(self) -> bool:
        """Whether it puts trained positions before the input instead of changing layers."""
        return self.config is not None and issubclass(self.config, PromptLearningConfig)

    @property
    def known(self) -> list[str]:
        """The keys that ``[tuner]`` may have beside ``method``, sorted."""
        if self.config is None:
            return sorted(self.usual)
        own = {item.name for item in dataclasses.fields(self.config)}
        own -= {*FOLLOWS, *_CLOSED, *self.fixed}
        return sorted(own | ({LORAPLUS} & self.usual.keys()))


METHODS: Mapping[str, Method] = {
    "full": Method(what="every parameter", source="", config=None),
    "gradual": Method(
        what="every parameter: `layers` from the top at first, as many more `every` so many steps",
        source="Howard and Ruder 2018, arXiv 1801.06146",
        config=None,
        usual={"every": 100, "layers": 1},
    ),
    "experts": Method(
        what="the experts of a mixture, nothing else",
        source="Wang et al. 2024, arXiv 2407.01906",
        config=None,
        part="experts",
    ),
    "router": Method(
        what="the routers of a mixture of experts", source="", config=None, part="router"
    ),
    "lora": Method(
        what="a low-rank product beside each layer",
        source="Hu et al. 2021, arXiv 2106.09685",
        config=LoraConfig,
        usual=_ALL,
    ),
    "qlora": Method(
        what="LoRA over an NF4 base",
        source="Dettmers et al. 2023, arXiv 2305.14314",
        config=LoraConfig,
        usual=_ALL,
    ),
    "lora-experts": Method(
        what="LoRA on the experts of a mixture, one for each expert",
        source="Hu et al. 2021, arXiv 2106.09685",
        config=LoraConfig,
        fixed={
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        part="experts",
    ),
    "lora-router": Method(
        what="LoRA on the routers of a mixture of experts",
        source="Hu et al. 2021, arXiv 2106.09685",
        config=LoraConfig,
        fixed={"target_modules": [], "target_parameters": ["gate.weight", "router.weight"]},
        part="router",
    ),
    "rslora": Method(
        what="LoRA scaled by 1/√r",
        source="Kalajdzievski 2023, arXiv 2312.03732",
        config=LoraConfig,
        fixed={"use_rslora": True},
        usual=_ALL,
    ),
    "dora": Method(
        what="LoRA of the direction, and each layer's magnitude",
        source="Liu et al. 2024, arXiv 2402.09353",
        config=LoraConfig,
        fixed={"use_dora": True},
        usual=_ALL,
    ),
    "lora+": Method(
        what="LoRA with a higher rate for B",
        source="Hayou et al. 2024, arXiv 2402.12354",
        config=LoraConfig,
        usual={**_ALL, LORAPLUS: 16.0},
    ),
    "pissa": Method(
        what="LoRA that starts at the base's largest singular vectors",
        source="Meng et al. 2024, arXiv 2404.02948",
        config=LoraConfig,
        fixed={"init_lora_weights": "pissa"},
        usual=_ALL,
    ),
    "adalora": Method(
        what="LoRA whose ranks are dealt out while training",
        source="Zhang et al. 2023, arXiv 2303.10512",
        config=AdaLoraConfig,
        fixed={"r": 8, "rank_pattern": None, "use_dora": False},  # PEFT ignores r here
        usual=_ALL,
    ),
    "ia3": Method(
        what="one factor for each number that passes",
        source="Liu et al. 2022, arXiv 2205.05638",
        config=IA3Config,
    ),
    "vera": Method(
        what="factors of one random low-rank product that all layers share",
        source="Kopiczko et al. 2023, arXiv 2310.11454",
        config=VeraConfig,
        usual=_ALL,
    ),
    "oft": Method(
        what="an orthogonal turn of each layer, in blocks",
        source="Qiu et al. 2023, arXiv 2306.07280",
        config=OFTConfig,
        usual=_ALL,
    ),
    "bitfit": Method(
        what="a bias for each linear layer, new where it has none",
        source="Ben Zaken et al. 2021, arXiv 2106.10199",
        config=BeftConfig,
        usual=_ALL,
        mergeable=False,  # most models have no bias that it could be added to
    ),
    "houlsby": Method(
        what="a bottleneck behind attention and behind the feed-forward layer",
        source="Houlsby et al. 2019, arXiv 1902.00751",
        config=LoraConfig,
        usual={"target_modules": HOULSBY},
        mergeable=False,
    ),
    "pfeiffer": Method(
        what="a bottleneck behind the feed-forward layer",
        source="Pfeiffer et al. 2020, arXiv 2005.00247",
        config=LoraConfig,
        usual={"target_modules": PFEIFFER},
        mergeable=False,
    ),
    "prompt": Method(
        what="trained vectors before the input",
        source="Lester et al. 2021, arXiv 2104.08691",
        config=PromptTuningConfig,
        usual={"num_virtual_tokens": 20},
        mergeable=False,
    ),
    "prefix": Method(
        what="trained keys and values before every layer's (p-tuning v2)",
        source="Li and Liang 2021, arXiv 2101.00190; Liu et al. 2021, arXiv 2110.07602",
        config=PrefixTuningConfig,
        usual={"num_virtual_tokens": 20},
        mergeable=False,
    ),
    "p-tuning": Method(
        what="vectors before the input, which a small network makes",
        source="Liu et al. 2021, arXiv 2103.10385",
        config=PromptEncoderConfig,
        usual={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
        mergeable=False,
    ),
}
"""Every tuner by its name."""

BOTTLENECKS = ("houlsby", "pfeiffer")
"""Methods that are not PEFT's own; see :mod:`fedward.tuning.bottleneck`."""


@contextmanager
def without_peft_noise() -> Iterator[None]:
    """Keep PEFT from warning of what is as it should be."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by the old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # A bias is what BitFit adds; that it cannot be merged stands in the table.
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias", UserWarning)
        # AdaLoRA's ranks are by parameter; PEFT looks for modules first, and then takes them. For a
        # mixture PEFT adds patterns of its own, of experts that LoRA on linear layers leaves alone.
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "Note that `r` is not used in AdaLora", UserWarning)
        # A layer that AdaLoRA left no rank is taken for one that was not gathered.
        warnings.filterwarnings("ignore", ".* LoRA tensor.* have invalid shape", UserWarning)
        yield


def check_method(method: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a tuner that there is not, or a key that it does not have.

    Raises:
        ConfigurationError: With the nearest name, or all.
    """
    if method not in METHODS:
        raise ConfigurationError(f"[tuner] {unknown('method', method, METHODS)}")
    found = METHODS[method]
    for key in arguments:
        if key in found.fixed or key in FOLLOWS:
            raise ConfigurationError(f"[tuner] {key!r} follows from the rest: leave it out")
        if key not in found.known:
            raise ConfigurationError(f"[tuner] {unknown('key', key, found.known)}")


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """What to say of a name that there is not: the nearest one, or all.

    >>> unknown("method", "loro", ["full", "lora"])
    "unknown method 'loro'; did you mean 'lora'?"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known {what}s: {', '.join(known) or 'none'}"
    return f"unknown {what} {name!r}; {hint}"


def peft_config(
    method: str, arguments: Mapping[str, Any], task: TaskType, *, steps: int | None = None
) -> PeftConfig | None:
    """PEFT's configuration of a tuner, or None for ``full``.

    Args:
        method: A name of :data:`METHODS`.
        arguments: Its keys, checked by :func:`check_method`.
        task: What the model is for; a classifier's head is trained too.
        steps: How many optimizer steps there will be, which ``adalora`` has to know.

    Raises:
        ConfigurationError: PEFT refuses a value.
    """
    found = METHODS[method]
    if found.config is None:
        return None
    given = {**found.usual, **arguments, **found.fixed}
    given.pop(LORAPLUS, None)
    if "target_parameters" in arguments and "target_modules" not in arguments:
        given.pop("target_modules")
    if method == "adalora":
        if steps is None:
            raise ConfigurationError("[train] max_steps is missing: adalora plans its ranks by it")
        given["total_step"] = steps
    if method in BOTTLENECKS and "r" in given:
        given.setdefault("lora_alpha", given["r"])  # PEFT divides by r; an adapter is not scaled
    try:
        with without_peft_noise():
            config = found.config(task_type=task, **given)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"[tuner] PEFT refuses it: {error}") from error
    if method in BOTTLENECKS:
        put_behind(config)
    return config
