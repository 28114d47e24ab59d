"""The registry: a version is there whole or not at all, and verify finds whatever was changed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedward import failpoints
from fedward.cli import app
from fedward.errors import ConfigurationError, IdentityError, InvalidValue, ModelError
from fedward.identity import Identity
from fedward.server.registry import MODEL, SIGNED, Registry, model_folder
from fedward.server.registry_version import Origin, Spent
from tests.server.office import make_coordinator

SPENT = Spent(epsilon=8.0, delta=1e-6, unit="patient", rounds=3, sites=4, minimum=3)


def origin(**changes: Any) -> Origin:
    given: dict[str, Any] = {
        "name": "notes",
        "kind": "language",
        "stage": "federation",
        "method": "lora",
        "quantize": "nf4",
        "base": "models/base",
        "base_sha256": "ab" * 32,
        "made_from": "cd" * 32,
        "metrics": {"loss": 1.25},
        "spent": SPENT,
    }
    return Origin(**(given | changes))


def fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "adapter.safetensors").write_bytes(bytes(range(100)))
    (folder / "deep" / "plan.json").write_text("{}")


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def chain(registry):
    """Three versions, each made from the one before."""
    first = registry.add(origin(), fill)
    second = registry.add(
        origin(stage="dpo", spent=None, parents=(registry.parent("notes:1"),), made_from="2" * 64),
        fill,
    )
    third = registry.add(
        origin(name="small", stage="distill", spent=None, parents=(registry.parent("notes"),)),
        fill,
    )
    return first, second, third


def test_versions_are_numbered_listed_and_found(registry, chain):
    assert [one.title for one in registry.all()] == ["notes:1", "notes:2", "small:1"]
    assert registry.get("notes") == registry.get("notes:2") == chain[1]
    assert registry.get("registry:notes:1") == chain[0]
    assert [one.title for one in registry.lineage(chain[2])] == ["notes:2", "notes:1"]
    assert (registry.path("notes:1") / "deep" / "plan.json").read_text() == "{}"
    assert chain[0].spent == SPENT
    for one in chain:
        assert registry.verify(one.title) == one
    assert registry.folder.stat().st_mode & 0o777 == 0o700


def test_the_same_origin_again_changes_nothing(registry, chain):
    again = registry.add(origin(), lambda folder: pytest.fail("nothing is written"))
    assert again == chain[0]
    assert len(registry.all()) == 3


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "x" * 129, "a:1"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(InvalidValue, match="1 to 128"):
        origin(name=name)


@pytest.mark.parametrize("text", ["nots", "notes:3", "notes:01", "notes:x", ":1"])
def test_what_is_not_there_is_named_beside_what_is(registry, chain, text):
    with pytest.raises(ConfigurationError, match=r"models: notes, small|versions of notes: 1, 2"):
        registry.get(text)


def test_a_changed_byte_a_missing_file_and_an_extra_one_are_found(registry, chain):
    path = registry.path("notes:1") / "adapter.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:50] + b"\xff" + good[51:])
    with pytest.raises(ModelError, match=r"adapter.safetensors: the file has changed"):
        registry.verify("notes:1")
    path.unlink()
    with pytest.raises(ModelError, match=r"adapter.safetensors: the file is missing"):
        registry.verify("notes:1")
    path.symlink_to(registry.path("small") / "adapter.safetensors")
    with pytest.raises(ModelError, match="not a link"):
        registry.verify("notes:1")
    path.unlink()
    path.write_bytes(good)
    registry.verify("notes:1")
    (path.parent / "deep" / "more.json").write_text("{}")
    with pytest.raises(ModelError, match=r"more.json: the file was not there"):
        registry.verify("notes:1")


def signed(registry: Registry, title: str) -> Path:
    name, _, number = title.partition(":")
    return registry.folder / "models" / name / number / SIGNED


@pytest.mark.parametrize("place", [0, 63, 64, 100, -1])
def test_no_byte_of_a_manifest_can_be_changed(registry, chain, place):
    path = signed(registry, "notes:1")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(IdentityError, match="the signature does not hold"):
        registry.verify("notes:1")


def test_a_missing_manifest_is_found(registry, chain):
    signed(registry, "notes:1").unlink()
    with pytest.raises(ModelError, match="manifest is missing"):
        registry.get("notes:1")


def test_a_manifest_of_another_version_does_not_serve(registry, chain):
    signed(registry, "notes:2").write_bytes(signed(registry, "notes:1").read_bytes())
    with pytest.raises(ModelError, match="is the manifest of notes:1, not of notes:2"):
        registry.verify("notes:2")


def test_a_manifest_signed_later_for_the_same_place_does_not_serve(registry, chain, tmp_path):
    other = Registry(tmp_path / "other")
    (registry.folder / "key").rename(other.folder / "key")
    Identity.load(other.folder / "key").save(registry.folder / "key")
    other.add(origin(metrics={"loss": 0.01}), fill)
    signed(registry, "notes:1").write_bytes(signed(other, "notes:1").read_bytes())
    with pytest.raises(ModelError, match="not the manifest that was put in"):
        registry.verify("notes:1")


def test_an_unknown_key_is_named_and_can_be_trusted(registry, chain):
    before = registry.identity().public_key
    (registry.folder / "key").unlink()
    with pytest.raises(IdentityError, match=f"unknown key, {before.hex()}"):
        registry.verify("notes:1")
    registry.verify("small:1", keys=[before])
    with pytest.raises(IdentityError, match="unknown key"):
        registry.verify("notes:1", keys=[Identity().public_key])


def forget(registry: Registry, name: str, number: int) -> None:
    with registry._index() as db:
        db.execute("DELETE FROM version WHERE name=? AND number=?", (name, number))


def test_a_lineage_with_a_missing_ancestor_is_broken(registry, chain):
    forget(registry, "notes", 1)
    for title in ("notes:2", "small:1"):
        with pytest.raises(ModelError, match=r"lineage of notes:2 is broken: its parent notes:1"):
            registry.verify(title)


def test_a_lineage_with_a_replaced_ancestor_is_broken(registry, chain):
    forget(registry, "notes", 2)
    replaced = registry.add(origin(made_from="3" * 64), fill)
    assert replaced.title == "notes:2"
    registry.verify("notes:2")
    with pytest.raises(ModelError, match=r"notes:2 is not the one that it was made from"):
        registry.verify("small:1")


def test_a_changed_file_of_a_base_is_found(registry, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    from fedward.tuning.models import fingerprint

    sha256 = fingerprint(base)
    for copy in (False, True):  # a copy replaces the link
        registry.keep_base(base, sha256, copy=copy)
        assert registry.base(sha256).is_symlink() is not copy
    registry.keep_base(base, sha256)
    assert not registry.base(sha256).is_symlink()
    registry.add(origin(base_sha256=sha256), fill)
    registry.verify("notes")
    (registry.base(sha256) / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ModelError, match="the base of notes:1 has changed"):
        registry.verify("notes")


def test_a_base_that_has_moved_is_linked_anew(registry, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    registry.keep_base(old, "ab" * 32)
    old.rename(new)
    assert not registry.base("ab" * 32).is_dir()
    registry.keep_base(new, "ab" * 32)
    assert registry.base("ab" * 32).resolve() == new


ADD = """
import os, sys
from pathlib import Path
from fedward import failpoints
from fedward.server.registry import Registry
from tests.server.test_registry import fill, origin
failpoints.arm_from(os.environ)
print(Registry(Path(sys.argv[1])).add(origin(made_from="e" * 64), fill).title)
"""


def add_elsewhere(folder: Path, armed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ADD, str(folder)],
        env=os.environ | {failpoints.VARIABLE: armed},
        capture_output=True,
        text=True,
        timeout=120,
    )


NEW = [name for name in failpoints.NAMES if name.startswith("registry.")]


@pytest.mark.slow
@pytest.mark.parametrize("place", [*NEW, "file.sync", "file.renamed"])
def test_a_kill_leaves_the_old_registry_and_the_next_one_adds(registry, chain, place):
    done = add_elsewhere(registry.folder, f"{place}:kill")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [one.title for one in registry.all()] == ["notes:1", "notes:2", "small:1"]
    for one in registry.all():
        registry.verify(one.title)
    assert registry.add(origin(made_from="f" * 64), fill).title == "notes:3"
    assert registry.verify("notes:3").made_from == "f" * 64
    assert not (registry.folder / "adding").exists()


def test_without_a_kill_the_version_is_there_at_once(registry, chain):
    done = add_elsewhere(registry.folder, "")
    assert (done.returncode, done.stdout) == (0, "notes:3\n"), done.stderr
    assert registry.verify("notes:3").made_from == "e" * 64


@pytest.mark.parametrize("place", NEW)
def test_an_error_on_the_way_leaves_the_old_registry(registry, chain, place):
    def handler(name):
        if name == place:
            failpoints.fail("enospc")

    with failpoints.armed(handler), pytest.raises(OSError, match="space"):
        registry.add(origin(made_from="e" * 64), fill)
    assert len(registry.all()) == 3
    assert registry.add(origin(made_from="f" * 64), fill).title == "notes:3"
    registry.verify("notes:3")


def test_a_coordinators_registry_signs_with_its_key(tmp_path):
    coordinator = make_coordinator(tmp_path / "coordinator")
    registry = Registry(coordinator.registry)
    version = registry.add(origin(), fill)
    assert version.signer == coordinator.identity().public_key.hex()
    assert not (registry.folder / "key").exists()
    registry.verify("notes")


def test_a_model_is_named_by_its_version_or_its_folder(registry, chain, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDWARD_REGISTRY", str(registry.folder))
    assert model_folder("registry:notes:1") == registry.folder / "models" / "notes" / "1" / MODEL
    assert model_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("FEDWARD_REGISTRY", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="no registry of models"):
        model_folder("registry:notes:1")
    assert not (tmp_path / "none").exists()


def typed(registry: Registry, *words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words, "--registry", str(registry.folder)])


def test_the_commands_show_what_there_is(registry, chain):
    listed = json.loads(typed(registry, "list", "--json").stdout)
    assert [one["version"] for one in listed] == ["notes:1", "notes:2", "small:1"]
    assert listed[0]["spent"] == dataclasses.asdict(SPENT)
    assert "notes:2" in typed(registry, "list").stdout
    shown = json.loads(typed(registry, "show", "small", "--json").stdout)
    assert [one["version"] for one in shown] == ["small:1", "notes:2", "notes:1"]
    said = typed(registry, "verify").stdout.splitlines()
    assert len(said) == 3
    assert "2 files, 2 ancestors" in said[2]
    assert isinstance(typed(registry, "verify", "none").exception, ConfigurationError)
    assert isinstance(typed(registry, "verify", "--key", "xy").exception, InvalidValue)


def test_the_card_says_what_the_manifests_say(registry, chain):
    card = typed(registry, "show", "small").stdout
    for words in (
        "# small:1",
        "notes:1: differential privacy for each `patient` of the sites, epsilon at most 8 at delta",
        "over 3 rounds of 4 sites (never fewer than 3 in a sum)",
        "Data of central training (small:1 (distill), notes:2 (dpo)) has **no** differential",
        "- small:1: distill, lora; from notes:2",
        "- notes:1: federation, lora; from base `models/base`",
        "| notes:1 | loss | 1.25 |",
        "AutoModelForCausalLM",
    ):
        assert words in card.replace("\n", " ").replace("  ", " ") or words in card, words
    bare = registry.add(origin(name="bare", spent=None), fill)
    assert "without** differential privacy" in typed(registry, "show", bare.title).stdout
