"""From a federated adapter to other programs: what the registry gives back is what was trained."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fedward.attempt import Attempt
from fedward.cli import app
from fedward.errors import ConfigurationError, ModelError
from fedward.plan import Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.server.central.job import Job, Step
from fedward.server.central.loading import open_base, open_trained
from fedward.server.central.manifest import MANIFEST
from fedward.server.central.running import run_job
from fedward.server.registry import Registry
from fedward.server.registry_entries import add_run
from fedward.server.registry_export import export, merge
from fedward.server.registry_version import Version
from fedward.server.store import Phase, RunStore
from fedward.simulations.case import Options
from fedward.simulations.simulate import run_simulation
from fedward.tuning.adapter import from_bytes, load_adapter
from fedward.tuning.models import fingerprint, load_base, resolve_model
from fedward.tuning.tuned import tuned_model
from fedward.tuning.tuners import attach
from fedward.tuning.vector import dimension, replace_vector
from tests.server.central.rig import build_base, make_step
from tests.simulations import tiny

QUIET = Console(file=io.StringIO())
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [11, 10, 9, 8, 7, 6, 5]])
LABELS = ("heart", "lung")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model", layers=2)


def make_plan(base: Path, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "name": "notes",
        "model": Model(path=str(base), sha256=fingerprint(base)),
        "tuner": Tuner(arguments={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        "task": Task(max_length=16),
        "data": Data(unit="patient"),
        "rounds": Rounds(
            count=2, steps=1, sampling_rate=0.5, normaliser=2.0, learning_rate=0.1, spare=0
        ),
        "privacy": Privacy(epsilon=8.0, delta=1e-5),
    }
    return Plan(**(given | changes))


def quantised(base: Path, quantize: Any) -> Plan:
    return make_plan(base, model=Model(path=str(base), sha256=fingerprint(base), quantize=quantize))


def classifier(base: Path, **changes: Any) -> Plan:
    return make_plan(base, task=Task(objective="classify", labels=LABELS, max_length=16), **changes)


def a_run(
    registry: Registry, plan: Plan, folder: Path, *, metrics: dict[str, Any] | None = None
) -> tuple[Version, bytes]:
    """A finished run whose adapter is not the start, in the registry."""
    tuned = tuned_model(plan)
    drawn = np.random.default_rng(7).normal(0, 0.1, dimension(tuned.layout)).astype(np.float32)
    adapter = replace_vector(tuned.start, tuned.layout, drawn)
    with contextlib.closing(RunStore(folder)) as store:
        name = store.put_blob(adapter)
        for number, cohort in enumerate(([0, 1, 2], [1, 2, 3]), start=1):
            attempt = Attempt(run="run", round=number)
            store.record(attempt, Phase.COMMITTED, {"adapter": name, "cohort": cohort})
        registry.keep_base(resolve_model(plan.model), str(plan.model.sha256))
        return add_run(registry, plan, "run", store, metrics), adapter


def trained_logits(plan: Plan, adapter: bytes) -> Tensor:
    """What the sites' own model computes with an adapter."""
    loaded, _ = load_base(plan.model, plan.task)
    model = attach(loaded, plan).eval()
    load_adapter(model, from_bytes(adapter))
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found.float()


def divergence(trained: Tensor, other: Tensor) -> float:
    """Mean KL of the next token's distribution."""
    p, q = trained.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.mark.parametrize("make", [make_plan, classifier])
def test_a_federated_run_ends_in_the_registry_and_is_loaded_as_it_was_trained(
    base, registry, tmp_path, make
):
    plan = make(base)
    version, adapter = a_run(registry, plan, tmp_path / "run", metrics={"loss": 1.0, "none": None})
    registry.verify("notes")
    assert (registry.path("notes") / "adapter.safetensors").read_bytes() == adapter
    assert (registry.path("notes") / "plan.json").read_bytes() == plan.to_json()
    spent = version.spent
    assert spent is not None
    assert (spent.epsilon, spent.delta, spent.unit) == (8.0, 1e-5, "patient")
    assert (spent.rounds, spent.sites, spent.minimum) == (2, 4, 3)
    assert version.metrics == {"loss": 1.0}
    model, _, kind = open_trained(registry.path("notes"))
    assert kind == ("classifier" if make is classifier else "language")
    trained = trained_logits(plan, adapter)
    assert torch.equal(logits(model), trained)
    start = trained_logits(plan, tuned_model(plan).start)
    assert (trained - start).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_merged_model_computes_what_base_and_adapter_did(base, registry, tmp_path, quantize):
    plan = quantised(base, quantize)
    version, adapter = a_run(registry, plan, tmp_path / "run")
    merged = merge(registry, "notes")
    assert merged.title == "notes:2"
    assert merged.parents[0].version == version.title
    registry.verify("notes")
    model, _, _ = open_trained(registry.path("notes"))
    assert "quantization_config" not in json.loads(
        (registry.path("notes") / "config.json").read_bytes()
    )
    trained = trained_logits(plan, adapter)
    # int8 rounds activations too, in training but not after it.
    tolerance = 1e-4 if quantize != "int8" else 5e-2
    assert (logits(model) - trained).abs().max() < tolerance
    assert merge(registry, "notes:1") == merged  # the same again
    with pytest.raises(ConfigurationError, match="whole model already"):
        merge(registry, "notes:2")


def test_a_merge_straight_into_nf4_or_into_the_original_would_lose(base, registry, tmp_path):
    plan = quantised(base, "nf4")
    _, adapter = a_run(registry, plan, tmp_path / "run")
    trained = trained_logits(plan, adapter)
    merge(registry, "notes")
    exact, _, _ = open_trained(registry.path("notes"))
    straight: Any = open_trained(registry.path("notes:1"))[0]
    with pytest.warns(UserWarning, match="rounding errors"):
        into_nf4 = straight.merge_and_unload()
    ours = divergence(trained, logits(exact))
    rounded = divergence(trained, logits(into_nf4))
    elsewhere = divergence(trained, trained_logits(make_plan(base), adapter))
    assert ours < 1e-6
    assert rounded > 100 * max(ours, 1e-8)
    assert elsewhere > 100 * max(ours, 1e-8)


def test_a_classifier_keeps_its_head_through_merge_and_export(base, registry, tmp_path):
    plan = classifier(base)
    _, adapter = a_run(registry, plan, tmp_path / "run")
    merge(registry, "notes")
    export(registry, "notes", "model", tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert plain.config.id2label == dict(enumerate(LABELS))
    assert (logits(plain) - trained_logits(plan, adapter)).abs().max() < 1e-4
    with pytest.raises(ConfigurationError, match="'full'"):
        export(registry, "notes", "adapter", tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="no trained head, and this is a classifier"):
        export(registry, "notes:1", "adapter", tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "registry", "run"]


def test_an_exported_model_is_plain_transformers_with_a_card(base, registry, tmp_path):
    plan = make_plan(base)
    _, adapter = a_run(registry, plan, tmp_path / "run")
    export(registry, "notes", "model", tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(plain) - trained_logits(plan, adapter)).abs().max() < 1e-4
    AutoTokenizer.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# notes:1\n")
    assert "epsilon at most 8" in card
    with pytest.raises(ConfigurationError, match="is there already"):
        export(registry, "notes", "model", tmp_path / "out")
    merge(registry, "notes")
    export(registry, "notes", "model", tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "out")
    assert registry.get("notes").whole_sha256 == fingerprint(tmp_path / "out")


def test_an_exported_adapter_is_pefts_folder_with_nothing_that_vllm_would_not_apply(
    base, registry, tmp_path
):
    plan = make_plan(base)
    _, adapter = a_run(registry, plan, tmp_path / "run")
    export(registry, "notes", "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["modules_to_save"] is None
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ends = {name.rsplit(".", 2)[1] for name in names}
    assert ends == {"lora_A", "lora_B"}
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    assert (logits(tuned) - trained_logits(plan, adapter)).abs().max() < 1e-5
    assert "--max-lora-rank 4" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "nothing else"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_vllm_would_serve_wrongly_is_refused(
    base, registry, tmp_path, arguments, words
):
    tuner = Tuner(arguments={"r": 4, "target_modules": ["q_proj", "v_proj"], **arguments})
    a_run(registry, make_plan(base, tuner=tuner), tmp_path / "run")
    with pytest.raises(ConfigurationError, match=words):
        export(registry, "notes", "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_version_whose_base_is_gone_says_so(base, registry, tmp_path):
    version, _ = a_run(registry, make_plan(base), tmp_path / "run")
    registry.base(version.base_sha256).unlink()
    registry.verify("notes")
    with pytest.raises(ModelError, match="--base"):
        export(registry, "notes", "model", tmp_path / "out")
    words = ["models", "export", "notes", "--out", str(tmp_path / "out"), "--base", str(base)]
    done = CliRunner().invoke(app, [*words, "--registry", str(registry.folder)])
    assert done.exit_code == 0, done.output
    assert "its model card" in done.stdout
    merged = CliRunner().invoke(
        app, ["models", "merge", "notes", "--registry", str(registry.folder), "--json"]
    )
    assert json.loads(merged.stdout)[0]["version"] == "notes:2"


def test_a_simulation_ends_in_the_registry_once(tmp_path):
    rows = [row for name in "abc" for row in tiny.make_rows(name, 6)]
    data = tiny.write_data(tmp_path / "data", rows)
    tiny.write_data(data, tiny.make_rows("d", 6), "test")
    plan = tmp_path / "plan.toml"
    plan.write_text(tiny.plan_text(tiny.build_base(tmp_path / "base")))
    options = Options(
        plan=plan, data=data, model=None, out=tmp_path / "out", compare=False, resume=True
    )
    for _ in range(2):
        run_simulation(options, QUIET)
    registry = Registry.there(tmp_path / "registry")
    (version,) = registry.all()
    registry.verify(version.title)
    assert (version.title, version.kind) == ("tiny:1", "classifier")
    assert {"accuracy", "loss"} <= version.metrics.keys()
    federated = (tmp_path / "out" / "run" / "models" / "federated.safetensors").read_bytes()
    assert (registry.path("tiny") / "adapter.safetensors").read_bytes() == federated


def test_nothing_that_does_not_verify_is_merged_or_exported(base, registry, tmp_path):
    a_run(registry, make_plan(base), tmp_path / "run")
    (registry.path("notes") / "extra").touch()
    with pytest.raises(ModelError, match="was not there"):
        merge(registry, "notes")
    with pytest.raises(ModelError, match="was not there"):
        export(registry, "notes", "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def job_of(step: Step, start: str) -> Job:
    return Job(
        name="notes",
        steps=(dataclasses.replace(step, model=dataclasses.replace(step.model, path=start)),),
    )


def test_central_training_starts_from_the_registry_and_ends_in_it(base, registry, tmp_path):
    plan = quantised(base, "nf4")
    a_run(registry, plan, tmp_path / "run")
    job = job_of(make_step(base, tmp_path, "dpo"), "registry:notes")
    (report,) = run_job(job, tmp_path / "out", QUIET, registry=registry)
    assert report["version"] == "notes:2"
    version = registry.verify("notes:2")
    assert [one.title for one in registry.lineage(version)] == ["notes:1"]
    assert version.base == "registry:notes:1"
    assert version.metrics["training_loss"] == report["training_loss"]
    assert version.spent is None
    before, _, _ = open_trained(tmp_path / "out" / "dpo" / "model")
    after, _, _ = open_trained(registry.path("notes:2"))
    assert torch.equal(logits(before), logits(after))
    # The merged start is kept in the registry, so that nothing of out/ is needed.
    assert not registry.base(version.base_sha256).is_symlink()
    again = run_job(
        job_of(make_step(base, tmp_path, "dpo"), "registry:notes:1"),
        tmp_path / "out",
        QUIET,
        resume=True,
        registry=registry,
    )
    assert again[0]["version"] == "notes:2"
    # An export of the parent is the base that the exported adapter wants.
    export(registry, "notes:1", "model", tmp_path / "below")
    assert fingerprint(tmp_path / "below") == version.base_sha256
    export(registry, "notes:2", "adapter", tmp_path / "above")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "below")
    tuned = PeftModel.from_pretrained(plain, str(tmp_path / "above"))
    assert (logits(tuned) - logits(after)).abs().max() < 1e-5


def test_a_base_that_was_trained_centrally_is_the_parent_of_a_federated_run(
    base, registry, tmp_path
):
    job = Job(name="base", steps=(make_step(base, tmp_path, "sft", "full"),))
    run_job(job, tmp_path / "out", QUIET, registry=registry)
    made = tmp_path / "out" / "sft" / "model"
    assert registry.verify("base").whole_sha256 == fingerprint(made)
    version, _ = a_run(registry, make_plan(made), tmp_path / "run")
    assert [parent.version for parent in version.parents] == ["base:1"]
    registry.verify("notes")


def test_a_job_without_a_registry_cannot_start_from_one(base, tmp_path):
    job = job_of(make_step(base, tmp_path, "sft"), "registry:notes:1")
    with pytest.raises(ConfigurationError, match="there is no registry here"):
        run_job(job, tmp_path / "out", QUIET)


@pytest.mark.slow
def test_an_exported_graph_gives_the_same_logits(base, registry, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    plan = make_plan(base)
    _, adapter = a_run(registry, plan, tmp_path / "run")
    export(registry, "notes", "onnx", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    given = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
    (found,) = session.run(None, given)
    assert np.abs(found - trained_logits(plan, adapter).numpy()).max() < 1e-4


def test_an_exported_base_is_what_open_base_takes(base, registry, tmp_path):
    a_run(registry, make_plan(base), tmp_path / "run")
    export(registry, "notes", "model", tmp_path / "out")
    open_base(tmp_path / "out", Model(path="x"), "language")
