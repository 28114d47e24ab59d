"""The demo's base: made once, taken up again after a kill, and good at public text only."""

import dataclasses
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedward.plan import Model
from fedward.simulations import base_model as module
from fedward.simulations.base_model import base_model
from fedward.simulations.demo import demo_plan
from fedward.simulations.notes import SERVICES, generate, public_corpus
from fedward.tuning.metrics import evaluate
from fedward.tuning.models import load_base
from fedward.tuning.objectives import encode
from fedward.tuning.records import group

PLAN = demo_plan()


@pytest.fixture
def brief(monkeypatch):
    """A training of four steps on little text."""
    monkeypatch.setattr(module, "ROWS", 300)
    settings = dataclasses.replace(module.SETTINGS, steps=4, save_every=2)
    monkeypatch.setattr(module, "SETTINGS", settings)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_base(Model(path=str(folder)), PLAN.task)


def test_the_plan_names_the_services_in_order():
    assert PLAN.task.labels == SERVICES
    assert PLAN.privacy.enabled


@pytest.mark.usefixtures("brief")
def test_a_base_is_made_once(tmp_path):
    steps = []
    folder = base_model(tmp_path, PLAN, seed=0, on_step=lambda done, _: steps.append(done))
    assert steps == [1, 2, 3, 4]
    assert base_model(tmp_path, PLAN, seed=0, on_step=lambda done, _: steps.append(done)) == folder
    assert len(steps) == 4
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("brief")
def test_a_killed_training_leaves_no_base_and_goes_on_to_the_same_one(tmp_path):
    def kill(done, _loss):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base_model(tmp_path / "killed", PLAN, seed=0, on_step=kill)
    assert not list((tmp_path / "killed").glob("base-*/config.json"))
    steps = []
    resumed = base_model(
        tmp_path / "killed", PLAN, seed=0, on_step=lambda done, _: steps.append(done)
    )
    whole = base_model(tmp_path / "whole", PLAN, seed=0)
    assert steps == [3, 4]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (resumed, whole)]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("brief")
def test_another_seed_or_template_is_another_base(tmp_path):
    other = dataclasses.replace(PLAN, data=dataclasses.replace(PLAN.data, template="{text}"))
    folders = {
        base_model(tmp_path, PLAN, seed=0),
        base_model(tmp_path, PLAN, seed=1),
        base_model(tmp_path, other, seed=0),
    }
    assert len(folders) == 3


@pytest.mark.usefixtures("brief")
def test_every_note_fits_the_plans_length(tmp_path):
    _, tokenizer = load(base_model(tmp_path, PLAN, seed=0))
    template = PLAN.data.template or ""
    texts = [template.format_map(row) for row in generate(0).test]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert max(lengths) <= PLAN.task.max_length
    # Longer would mean that words fall apart into pieces, and that the demo gets slow.
    assert sum(lengths) / len(lengths) < 30


@pytest.mark.slow
def test_the_base_knows_public_text_but_not_how_hospitals_write(tmp_path):
    model, tokenizer = load(base_model(tmp_path, PLAN, seed=0))
    public = encode(group(public_corpus(7, 1000), None), tokenizer, PLAN)
    notes = encode(group(generate(0).test, "patient"), tokenizer, PLAN)
    on_public, on_notes = (evaluate(model, e).accuracy or 0.0 for e in (public, notes))
    assert on_public > 0.85  # one label in ten is drawn at random
    assert 1.5 / len(SERVICES) < on_notes < 0.65
