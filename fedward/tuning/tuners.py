"""PEFT methods over a frozen base: what of a model is trained, and where it starts.

The update of a site is exactly :func:`trainable`: every parameter that requires a gradient, in the
order of their names.
"""

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedward.canonical import digest
from fedward.errors import ConfigurationError, InvalidValue
from fedward.plan import Plan
from fedward.tuning.methods import (
    FOLLOWS,
    LORAPLUS,
    METHODS,
    peft_config,
    unknown,
    without_peft_noise,
)
from fedward.tuning.models import public_uniform

_OURS = (
    *FOLLOWS,
    "init_lora_weights",  # some change the base, others need data; ours starts alike everywhere
)
"""Fields of PEFT that follow from the rest of the plan."""

_PLACES = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
_LORA = (
    *_PLACES,
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)
_BOTTLENECK = (*_PLACES, "lora_alpha", "lora_dropout", "modules_to_save", "r")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "lora": _LORA,
    "rslora": tuple(key for key in _LORA if key != "use_rslora"),
    "dora": tuple(key for key in _LORA if key != "use_dora"),
    "lora+": (*_LORA, LORAPLUS),
    "houlsby": _BOTTLENECK,
    "pfeiffer": _BOTTLENECK,
    "ia3": (
        "exclude_modules",
        "fan_in_fan_out",
        "feedforward_modules",
        "modules_to_save",
        "target_modules",
    ),
    "vera": (
        *_PLACES[1:],
        "bias",
        "d_initial",
        "fan_in_fan_out",
        "modules_to_save",
        "r",
        "vera_dropout",
    ),
    "oft": (
        *_PLACES,
        "bias",
        "block_share",
        "fan_in_fan_out",
        "modules_to_save",
        "module_dropout",
        "num_cayley_neumann_terms",
        "oft_block_size",
        "use_cayley_neumann",
    ),
    "bitfit": ("modules_to_save", "target_modules"),
    "prompt": ("num_virtual_tokens",),
    "prefix": ("encoder_hidden_size", "num_virtual_tokens", "prefix_projection"),
    "p-tuning": ("encoder_hidden_size", "num_virtual_tokens"),
}
"""What a plan may say to PEFT. Closed lists: of other keys some read files or data, some draw from
torch's generator, some copy layers without end, one names a module to import, and ``coft`` lets a
forward pass move the weights, which tells that a step has drawn somebody."""

_DROPOUTS = ("lora_dropout", "module_dropout", "vera_dropout")
_SIZES = (
    "encoder_hidden_size",
    "num_cayley_neumann_terms",
    "num_virtual_tokens",
    "oft_block_size",
)
_MOST_RANK, _MOST_SIZE, _MOST_RATIO = 1024, 65536, 1000


def attach(base: PreTrainedModel, plan: Plan) -> PeftModel:
    """Wrap a base, already on its device, in the plan's tuner at its start.

    The start is a public function of the plan. It computes what the base does, but for the methods
    that put vectors before the input.

    LoRA's A is uniform in ±1/√n as in PEFT, B is zero, so that the start computes what the base
    does. Under ``ffa`` and ``alternating`` A has orthonormal rows (A·Aᵀ = I by QR); under ``ffa``
    it is frozen (FFA-LoRA, Sun et al. 2403.12313). For ``classify`` the head ``score`` or
    ``classifier`` is trained too; a BERT pooler is not, unless ``modules_to_save`` names it.

    Args:
        base: From :func:`fedward.tuning.models.load_base`; changed in place.
        plan: Its tuner, task, aggregation scheme and seed.

    Returns:
        The model, trainable parameters in float32.

    Raises:
        ConfigurationError: A key that PEFT does not have or refuses, layers that the model does not
            have, trainable embeddings or output layers, or a rank above a layer's width.
        InvalidValue: Vectors before the input leave no place for ``max_length`` tokens.
    """
    configuration, outer = _configuration(plan), _outer_layers(base)
    _check_room(base, configuration, plan)
    check_last_token(base, plan.tuner.method)
    try:
        # PEFT draws some starts from torch's generator: all sites draw the same numbers.
        with without_peft_noise(), torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(digest("tuner", plan.seed.to_bytes(4, "big"))[:4]))
            if plan.model.gradient_checkpointing:
                base.activation_checkpointing_enable({"use_reentrant": False})
            model = get_peft_model(base, configuration)
    except (ValueError, TypeError, NotImplementedError, AttributeError, ImportError) as error:
        raise ConfigurationError(f"[tuner] PEFT refuses it: {error}") from error
    _refuse_shared(model, outer)
    for name, parameter in trainable(model).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            _start(parameter, name, plan)
    _check_personal(model, plan)
    return model


def check_last_token(base: PreTrainedModel, method: str) -> None:
    """Refuse vectors before the input of a model that judges an example by its last token.

    Beside vectors it sees no token, so that a row's end would be that of the batch.

    Raises:
        ConfigurationError: With what to use instead.
    """
    if method in {"prompt", "p-tuning"} and "score" in dict(base.named_children()):
        raise ConfigurationError(
            f"[tuner] {method!r} under a head for classes or rewards needs an encoder like BERT: a "
            "decoder judges by an example's last token, which it does not find behind vectors; "
            "use 'prefix'"
        )


def _check_room(base: PreTrainedModel, configuration: PeftConfig, plan: Plan) -> None:
    """Refuse vectors that leave a record of ``max_length`` no place: it would end the training."""
    if not isinstance(configuration, PromptLearningConfig):
        return
    vectors, facts = configuration.num_virtual_tokens or 0, base.config.get_text_config().to_dict()
    places = facts.get("max_position_embeddings", plan.task.max_length + vectors)
    if plan.task.max_length + vectors > places:
        allowed = f"at most {places - vectors}: the model has {places} places, and the tuner puts "
        raise InvalidValue("max_length", plan.task.max_length, f"{allowed}{vectors} vectors there")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training changes, sorted by name: exactly these are the update."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def personal(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The trainable parameters that stay at each site, sorted by name."""
    return {n: p for n, p in trainable(model).items() if _names(plan.tuner.personal, n)}


def _names(parts: Collection[str], name: str) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _check_personal(model: nn.Module, plan: Plan) -> None:
    own, names = personal(model, plan), trainable(model)
    for part in plan.tuner.personal:
        if not any(_names([part], name) for name in own):
            raise ConfigurationError(f"[tuner] personal: nothing that is trained is named {part!r}")
    if own.keys() == names.keys():
        raise ConfigurationError(
            "[tuner] personal: nothing is left for the sites to train together"
        )


@contextlib.contextmanager
def training_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze every trainable parameter that is not named, until the block ends."""
    resting = [parameter for name, parameter in trainable(model).items() if name not in names]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def _configuration(plan: Plan) -> PeftConfig:
    method = plan.tuner.method
    given = copy.deepcopy(dict(plan.tuner.arguments))  # PEFT adds heads to our modules_to_save
    for key in given:
        if key in _OURS:
            raise ConfigurationError(f"[tuner] {key!r} follows from the plan: leave it out")
        if key not in _KEYS[method]:
            raise ConfigurationError(f"[tuner] {unknown('key', key, _KEYS[method])}")
    _check_values(given, plan)
    if method == "vera":
        given["projection_prng_key"] = plan.seed
    classify = plan.task.objective == "classify"
    task = TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM
    config = peft_config(method, given, task)
    if config is None:
        raise ConfigurationError(f"[tuner] {method!r} is not trained at sites")
    return config


def _check_values(given: Mapping[str, Any], plan: Plan) -> None:
    """Refuse what PEFT takes and a site must not."""
    pattern = given.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise InvalidValue("[tuner] rank_pattern", pattern, "a table of names and ranks")
    for key, rank in {"r": given.get("r", 8), **pattern}.items():
        if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
            raise InvalidValue(f"[tuner] {key}", rank, f"1 to {_MOST_RANK}")
    for key in _SIZES:
        if key in given and not (type(given[key]) is int and 1 <= given[key] <= _MOST_SIZE):
            raise InvalidValue(f"[tuner] {key}", given[key], f"1 to {_MOST_SIZE}")
    ratio = given.get(LORAPLUS, 1)
    if type(ratio) not in (int, float) or not 1 <= ratio <= _MOST_RATIO:
        raise InvalidValue(f"[tuner] {LORAPLUS}", ratio, f"1 to {_MOST_RATIO}")
    for key in _DROPOUTS:
        if plan.privacy.enabled and given.get(key):
            # Its masks would come from torch's generator, which keeps 32 bits of its seed.
            raise InvalidValue(f"[tuner] {key}", given[key], "0 under privacy")


def _outer_layers(base: PreTrainedModel) -> tuple[str, ...]:
    """Names, inside the wrapped model, of embeddings and language-model output."""
    output = base.get_output_embeddings()  # type: ignore[no-untyped-call]  # not annotated there
    outer = {id(base.get_input_embeddings()), id(output)}
    return tuple(f"base_model.model.{n}." for n, m in base.named_modules() if id(m) in outer)


def _refuse_shared(model: nn.Module, outer: tuple[str, ...]) -> None:
    """Refuse what would train embeddings, the output layer or one weight at two places.

    An embedding's gradient is not bounded by the engine of DP-SGD, and of a weight that two places
    share it would see half.
    """
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if name.startswith(outer) or id(parameter) in seen:
            raise ConfigurationError(
                f"[tuner] would train {name}: embeddings, output layers and shared weights stay "
                "frozen; name other layers in target_modules and modules_to_save"
            )
        seen.add(id(parameter))


def rates(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """The trainable parameters with the local optimizer's rate of each, as torch takes them.

    ``lora+`` moves B by a multiple of the plan's rate (Hayou et al. 2024, arXiv 2402.12354).
    """
    rate = plan.rounds.learning_rate
    faster, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in trainable(model).items():
        (faster if ".lora_B." in name else others).append(parameter)
    if plan.tuner.method != "lora+":
        return [{"params": list(trainable(model).values()), "lr": rate}]
    ratio = {**METHODS["lora+"].usual, **plan.tuner.arguments}[LORAPLUS]
    groups = [{"params": others, "lr": rate}, {"params": faster, "lr": rate * ratio}]
    return [group for group in groups if group["params"]]


def _start(parameter: nn.Parameter, name: str, plan: Plan) -> None:
    """Set one LoRA A, shape (r, n), from the plan's seed and its name."""
    r, n = parameter.shape
    drawn = public_uniform(parameter.shape, "adapter", plan.seed.to_bytes(4, "big"), name)
    scheme = plan.aggregation.scheme
    if scheme in {"ffa", "alternating"}:
        if r > n:
            raise ConfigurationError(
                f"[tuner] r = {r}: {scheme!r} allows at most the width {n} of {name}"
            )
        q, upper = torch.linalg.qr(drawn.double().T)
        drawn = (q * upper.diagonal().sign()).T.float()
        parameter.requires_grad_(scheme == "alternating")
    else:
        drawn = drawn / math.sqrt(n)
    with torch.no_grad():
        parameter.copy_(drawn)
