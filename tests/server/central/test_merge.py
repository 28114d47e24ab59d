"""Several adapters made into one: exact where it can be, and what each way is good for."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedward.errors import ConfigurationError, ModelError
from fedward.plan import Model
from fedward.server.central.job import Data, Job, Keep, Merge, load_job
from fedward.server.central.loading import open_trained, starting_folder
from fedward.server.central.manifest import read_manifest
from fedward.server.central.merging import merge_adapters
from tests.server.central.rig import build_base, make_step, run, write_rows
from tests.server.central.test_keep import NEW

TRAIN = {"max_steps": 40, "learning_rate": 1e-2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Adapters of two tasks on one base."""
    folder = tmp_path_factory.mktemp("two")
    base = build_base(folder / "base")
    new = write_rows(folder / "new.jsonl", NEW)
    one = make_step(base, folder, "sft", train=TRAIN, name="one")
    other = make_step(base, folder, "sft", train=TRAIN, name="two", data=Data(train=str(new)))
    run(one, other, out=folder / "out")
    return base, [folder / "out" / name / "model" for name in ("one", "two")]


def merged(two: Any, folder: Path, **given: Any) -> Path:
    paths = tuple(str(path) for path in two[1])
    out = folder / "merged" / "model"
    out.parent.mkdir(parents=True, exist_ok=True)
    merge_adapters(Merge(name="merged", models=paths, **given), two[1], out, "00")
    return out


def change(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to its base's weights."""
    whole, _, _ = open_trained(starting_folder(adapter, folder))
    before, _, _ = open_trained(base)
    start = dict(before.named_parameters())
    return {name: (p - start[name]).detach() for name, p in whole.named_parameters()}


def error(two: Any, folder: Path, **given: Any) -> float:
    """How far a merge is from the sum of both changes, over the sum's size."""
    base, adapters = two
    one, other = (change(base, a, folder / str(i)) for i, a in enumerate(adapters))
    found = change(base, merged(two, folder, weights=(1.0, 1.0), **given), folder / "whole")
    wanted = torch.cat([(one[n] + other[n]).flatten() for n in one])
    return float((torch.cat([found[n].flatten() for n in one]) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("given", [{"how": "cat"}, {"how": "svd", "rank": 8}], ids=["cat", "svd"])
def test_two_ways_are_exact(two, tmp_path, given):
    assert error(two, tmp_path, **given) < 1e-4


def test_the_average_of_the_factors_is_not(two, tmp_path):
    assert error(two, tmp_path, how="linear") > 0.1


@pytest.mark.parametrize("how", ["ties", "ties_svd", "dare_linear_svd", "dare_ties"])
def test_it_is_a_model_that_can_be_used_and_trained_on(two, tmp_path, how):
    folder = merged(two, tmp_path, how=how, density=0.5)
    model, _, kind = open_trained(folder)
    assert kind == "language"
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.method == "lora"
    assert (starting_folder(folder, tmp_path / "whole") / "config.json").exists()


def test_a_seed_decides_what_dare_drops(two, tmp_path):
    given: dict[str, Any] = {"how": "dare_linear", "density": 0.5}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ends = [
        (merged(two, tmp_path / str(n), seed=seed, **given) / "adapter_model.safetensors")
        for n, seed in enumerate((0, 0, 1))
    ]
    one, again, other = (path.read_bytes() for path in ends)
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)  # the caller's numbers are left alone


def test_a_job_merges_and_goes_on_from_there(two, tmp_path):
    """Two thirds of what the new adapter lacks of the old task are there again."""
    base, (old, new) = two
    keep = Keep(evaluation=make_step(base, tmp_path, "sft").data.train)
    look = {"max_steps": 1, "learning_rate": 1e-9}
    steps = [
        make_step(base, tmp_path, "sft", name=name, model=Model(path=p), keep=keep, train=look)
        for name, p in (("known", str(old)), ("alone", str(new)), ("after", "step:both"))
    ]
    merge = Merge(name="both", models=(str(old), str(new)), how="cat")
    job = Job(name="job", steps=tuple(steps), merges=(merge,))
    assert [each.name for each in job.order()] == ["both", "known", "alone", "after"]
    out = tmp_path / "out"
    reports = run(*job.steps, merge, out=out)
    assert [report["stage"] for report in reports] == ["merge", "sft", "sft", "sft"]
    known, alone, after = (report["kept"]["before"]["loss"] for report in reports[1:])
    assert alone - known > 0.5
    assert after - known < 0.5 * (alone - known)
    assert run(*job.steps, merge, out=out, resume=True) == reports
    with pytest.raises(ConfigurationError, match="use --resume"):
        run(merge, out=out)
    with pytest.raises(ConfigurationError, match="made from another step"):
        run(dataclasses.replace(merge, how="svd"), out=out, resume=True)


def test_a_merge_of_steps_waits_for_them(tmp_path):
    steps = tuple(make_step(tmp_path, tmp_path, "sft", name=name) for name in ("one", "two"))
    both = Merge(name="both", models=("step:one", "step:two"))
    more = Merge(name="more", models=("step:both", "elsewhere"))
    job = Job(name="job", steps=steps, merges=(more, both))
    assert [each.name for each in job.order()] == ["one", "two", "both", "more"]
    with pytest.raises(ConfigurationError, match="an earlier step"):
        Job(name="job", steps=steps[:1], merges=(both,))


def test_a_file_may_hold_nothing_but_merges(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        'name = "j"\n[[merges]]\nname = "m"\nmodels = ["a", "b"]\nhow = "ties"\ndensity = 0.2\n'
    )
    assert load_job(path).merges == (Merge(name="m", models=("a", "b"), how="ties", density=0.2),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ("a",)}, "two or more"),
        ({"weights": (1.0,)}, "one for each model"),
        ({"how": "ties"}, "needs density"),
        ({"how": "cat", "density": 0.5}, "has no density"),
        ({"how": "dare_ties", "density": 0.0}, "density"),
        ({"how": "cat", "rank": 4}, "none unless"),
        ({"rank": 0}, "1 or more"),
        ({"seed": -1}, "seed"),
        ({"name": "A"}, "name"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigurationError, match=said):
        Merge(**{"name": "m", "models": ("a", "b"), **given})


def test_other_bases_and_other_tuners_are_refused(two, tmp_path):
    base, adapters = two
    merge = Merge(name="m", models=("a", "b"))
    for number, (start, method, said) in enumerate(
        [
            (build_base(tmp_path / "other", seed=1), "lora", "same base"),
            (base, "ia3", "one of lora"),
        ]
    ):
        out = tmp_path / str(number)
        run(make_step(start, tmp_path, "sft", method), out=out)
        with pytest.raises(ModelError, match=said):
            merge_adapters(merge, [adapters[0], out / "sft" / "model"], tmp_path / "m", "00")
    with pytest.raises(ModelError, match="expected a language model's adapter"):
        merge_adapters(merge, [adapters[0], base], tmp_path / "m", "00")
