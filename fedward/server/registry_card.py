"""The model card: what a version's signed manifest and its lineage say, for people."""

from collections.abc import Iterator, Sequence

from fedward.server.registry_version import Version

_LOADING = {
    "model": """\
```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
""",
    "adapter": """\
```
vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {name}=THIS_FOLDER
```

`BASE` is a folder with the base whose digest stands above; the adapter fits no other.
""",
    "onnx": """\
`model.onnx` takes `input_ids` and `attention_mask` (int64, batch by tokens) and gives `logits`
(float32). The tokenizer is in the same folder.
""",
}


def model_card(
    version: Version, lineage: Sequence[Version], *, form: str = "model", rank: int = 0
) -> str:
    """Markdown with base, privacy, lineage, metrics, limits and how to load.

    Args:
        version: What is described.
        lineage: What it descends from, nearest first (:meth:`Registry.lineage`).
        form: How it lies in the folder of the card: ``model``, ``adapter`` or ``onnx``.
        rank: The adapter's highest rank, for ``adapter``.
    """
    auto = f"AutoModelFor{'CausalLM' if version.kind == 'language' else 'SequenceClassification'}"
    loading = _LOADING[form].format(auto=auto, name=version.name, rank=rank)
    parts = [
        f"# {version.title}\n",
        _facts(version),
        "## Privacy\n",
        *_privacy([version, *lineage]),
        "## Lineage\n",
        *_lineage(version, lineage),
        "## Metrics\n",
        *_metrics([version, *lineage]),
        "## Limits\n",
        _LIMITS,
        "## Loading\n",
        loading,
    ]
    return "\n".join(parts)


def _facts(version: Version) -> str:
    rows = {
        "kind": version.kind,
        "made by": version.stage,
        "tuner": version.method,
        "base held in training as": version.quantize.replace("none", "float32"),
        "base": f"`{version.base}`",
        "digest of the base": f"`{version.base_sha256}`",
        "made": version.created,
        "signed by": f"`{version.signer}`",
    }
    return "".join(f"- {key}: {value}\n" for key, value in rows.items())


def _privacy(all_versions: Sequence[Version]) -> Iterator[str]:
    federated = [version for version in all_versions if version.spent is not None]
    for version in federated:
        spent = version.spent
        if spent is None:
            continue
        alone = f", {spent.central_rounds} more by the coordinator" if spent.central_rounds else ""
        yield (
            f"- {version.title}: differential privacy for each `{spent.unit}` of the sites, epsilon"
            f" at most {spent.epsilon:g} at delta {spent.delta:g}, over {spent.rounds} rounds of "
            f"{spent.sites} sites (never fewer than {spent.minimum} in a sum){alone}. Whatever was "
            "done with the adapter afterwards costs these units nothing more."
        )
    if len(federated) > 1:
        yield "- Who took part in several of these runs pays their epsilons together."
    noisy = [v.title for v in all_versions if v.stage == "federation" and v.spent is None]
    if noisy:
        yield f"- {', '.join(noisy)}: a federation **without** differential privacy."
    central = [v for v in all_versions if v.stage not in ("federation", "merge")]
    if central or any(v.spent is not None and v.spent.central_rounds for v in federated):
        names = ", ".join(f"{v.title} ({v.stage})" for v in central) or "the coordinator's rounds"
        yield (
            f"- Data of central training ({names}) has **no** differential privacy: records may be "
            "found again in the model."
        )
    yield ""


def _lineage(version: Version, lineage: Sequence[Version]) -> Iterator[str]:
    for one in (version, *lineage):
        before = ", ".join(parent.version for parent in one.parents) or f"base `{one.base}`"
        yield f"- {one.title}: {one.stage}, {one.method}; from {before}"
    yield ""


def _metrics(all_versions: Sequence[Version]) -> Iterator[str]:
    found = [(v.title, name, value) for v in all_versions for name, value in v.metrics.items()]
    if not found:
        yield "None were registered.\n"
        return
    yield "| version | metric | value |\n|---|---|---|"
    for title, name, value in found:
        yield f"| {title} | {name} | {value:.4g} |"
    yield ""


_LIMITS = """\
- The bound holds for a unit at one site; a patient who was at two sites pays for both.
- A site that lies can make the model worse; secure aggregation hides that like all else.
- Metrics hold for the records that they were measured on. Nothing here says that the model is fit
  for use on patients.
"""
