"""``fedward models list | show | verify | merge | export``."""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedward.errors import InvalidValue
from fedward.server.registry import DEFAULT, Registry
from fedward.server.registry_card import model_card
from fedward.server.registry_version import Version

models_app = typer.Typer(
    no_args_is_help=True, help="The registry: versions of models with signed manifests."
)

_Registry = Annotated[
    Path,
    typer.Option(
        "--registry",
        envvar="FEDWARD_REGISTRY",
        help="The registry's folder; a coordinator's is COORDINATOR/registry.",
    ),
]
_Name = Annotated[str, typer.Argument(help="NAME (the newest version) or NAME:NUMBER.")]
_Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="A public key (hex) that may have signed, beside the registry's."),
]
_Base = Annotated[
    Path | None,
    typer.Option(help="The base model's folder, if it is not where it was."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


class Form(StrEnum):
    """How a version is exported."""

    MODEL = "model"
    ADAPTER = "adapter"
    ONNX = "onnx"


@models_app.command("list")
def list_versions(registry: _Registry = DEFAULT, json_output: _Json = False) -> None:
    """Every version, oldest first: what made it, from what, and what it cost in privacy."""
    versions = Registry.there(registry).all()
    if json_output:
        _print_json(versions)
        return
    table = Table("version", "made by", "tuner", "from", "epsilon", "metrics")
    for one in versions:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in one.metrics.items())
        table.add_row(
            one.title,
            one.stage,
            one.method,
            escape(", ".join(parent.version for parent in one.parents) or one.base),
            f"{one.spent.epsilon:g}" if one.spent else "",
            metrics,
        )
    Console().print(table)


@models_app.command()
def show(name: _Name, registry: _Registry = DEFAULT, json_output: _Json = False) -> None:
    """One version as its model card: base, privacy, lineage, metrics, limits, how to load."""
    kept = Registry.there(registry)
    version = kept.get(name)
    if json_output:
        _print_json([version, *kept.lineage(version)])
    else:
        Console().print(model_card(version, kept.lineage(version)), markup=False, highlight=False)


@models_app.command()
def verify(
    name: Annotated[
        str | None, typer.Argument(help="NAME or NAME:NUMBER; left out, every version.")
    ] = None,
    registry: _Registry = DEFAULT,
    key: _Keys = None,
    json_output: _Json = False,
) -> None:
    """Check signature, every file, lineage, and the base where it is here.

    Exit code 0: all holds; 1: the message says which file, manifest or ancestor does not.
    """
    kept, keys = Registry.there(registry), _keys(key)
    names = [version.title for version in kept.all()] if name is None else [name]
    found = [kept.verify(one, keys=keys) for one in names]
    if json_output:
        _print_json(found)
        return
    for version in found:
        here = kept.base(version.base_sha256).is_dir()
        base = "its base" if here else "its base is not here, and was not checked"
        typer.echo(
            f"{version.title}: signature, {len(version.files)} files, "
            f"{len(kept.lineage(version, keys=keys))} ancestors and {base}"
        )


@models_app.command()
def merge(
    name: _Name,
    registry: _Registry = DEFAULT,
    base: _Base = None,
    key: _Keys = None,
    json_output: _Json = False,
) -> None:
    """Make base and adapter one whole model, as a new version.

    A quantised base is dequantised first: merged into 4-bit weights, the adapter would be
    rounded with them.
    """
    from fedward.server.registry_export import merge as run  # imports torch

    kept = _with_base(registry, base)
    version = run(kept, name, keys=_keys(key))
    if json_output:
        _print_json([version])
    else:
        typer.echo(f"{version.title}: {version.parents[0].version} as one whole model")


@models_app.command()
def export(
    name: _Name,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="model: safetensors for transformers; adapter: PEFT's folder for vLLM; onnx.",
        ),
    ] = Form.MODEL,
    registry: _Registry = DEFAULT,
    base: _Base = None,
    key: _Keys = None,
    json_output: _Json = False,
) -> None:
    """Write a version into a folder that other programs load, with a model card.

    It is verified first. An adapter that vLLM could not serve is refused with the reason.
    """
    from fedward.server.registry_export import export as run  # imports torch

    kept = _with_base(registry, base)
    version = run(kept, name, form.value, out, keys=_keys(key))
    if json_output:
        _print_json([version])
    else:
        typer.echo(f"{version.title} in {out}, with README.md, its model card")


def _keys(given: list[str] | None) -> list[bytes]:
    """Public keys from their hex digits."""
    try:
        keys = [bytes.fromhex(key) for key in given or ()]
    except ValueError as error:
        raise InvalidValue("--key", given, "64 hex digits each") from error
    if any(len(key) != 32 for key in keys):
        raise InvalidValue("--key", given, "64 hex digits each")
    return keys


def _with_base(registry: Path, base: Path | None) -> Registry:
    kept = Registry.there(registry)
    if base is not None:
        from fedward.tuning.models import fingerprint

        kept.keep_base(base, fingerprint(base))
    return kept


def _print_json(versions: list[Version]) -> None:
    found = [{"version": one.title, **dataclasses.asdict(one)} for one in versions]
    typer.echo(json.dumps(found, indent=2))
