"""Models that are alike are seldom called different, and a planted difference is found."""

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ConfigurationError, ModelError
from fedward.server.central.comparing import compare_models, compare_scores, mcnemar, verdict
from fedward.server.central.opening import open_model
from fedward.server.central.scoring import Asked, Scores
from fedward.tuning.resampling import Units, each_row, units_of
from tests.server.central.rig import ROWS, build_base, make_step, run, write_rows

QUIET = Console(file=io.StringIO())
SEEDS = 100
ERROR = 0.0218
"""Standard error of a share of 5 % among 100 seeds."""

Rows = Callable[[np.random.Generator, float], Scores]


def labelled(generator: np.random.Generator, better: float = 0.0) -> Scores:
    """200 rows of three classes, 70 % of them right or more; some rows are harder than others."""
    truth = np.arange(200.0) % 3
    right = generator.random(200) < HARD + better
    wrong = (truth + generator.integers(1, 3, 200)) % 3
    return Scores(
        numbers={
            "truth": truth,
            "predicted": np.where(right, truth, wrong),
            "correct": right.astype(float),
        },
        labels=("a", "b", "c"),
    )


HARD = 0.5 + 0.4 * np.random.default_rng(99).random(200)


def preferring(generator: np.random.Generator, better: float = 0.0) -> Scores:
    """200 pairs, 70 % of them preferred rightly or more; some are harder than others."""
    margin = HARD + better - generator.random(200)
    return Scores(numbers={"preferred": (margin > 0).astype(float), "margin": margin})


def written(generator: np.random.Generator, better: float = 0.0) -> Scores:
    """200 answers in 40 units; a unit's rows are nearly alike."""
    own = np.tile(generator.normal(size=40), 5)
    tokens = np.tile(np.arange(40.0) % 7 + 3, 5)
    nll = tokens * (3.0 - better + 0.5 * own + 0.1 * generator.normal(size=200))
    return Scores(numbers={"nll": nll, "tokens": tokens, "bytes": 4 * tokens})


BY_ROW = each_row(200)
BY_UNIT = units_of([f"u{i % 40}" for i in range(200)])


def called_different(
    rows: Rows,
    units: Units,
    better: float = 0.0,
    *,
    decides: str | None = None,
    seeds: int = SEEDS,
) -> float:
    """In how many of the seeds a difference is shown."""
    found = 0
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        one, other = rows(generator, better), rows(generator, 0.0)
        found += compare_scores(one, other, units, decides=decides, resamples=60).shown
    return found / seeds


def test_alike_by_mcnemar():
    assert called_different(preferring, BY_ROW) <= 0.05


def test_alike_by_unit():
    assert called_different(written, BY_UNIT) <= 0.05 + 2 * ERROR


def test_rows_of_one_unit_taken_for_many_are_called_different_far_too_often():
    """The control: it is the units that hold the level."""
    assert called_different(written, BY_ROW) > 0.3


@pytest.mark.parametrize(
    ("rows", "units", "better"), [(preferring, BY_ROW, 0.2), (written, BY_UNIT, 0.6)]
)
def test_a_planted_difference_is_found(rows, units, better):
    assert called_different(rows, units, better) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "units", "decides"),
    [
        (labelled, BY_ROW, "accuracy"),
        (labelled, BY_ROW, "macro_f1"),
        (preferring, BY_ROW, "mean_margin"),
        (written, BY_UNIT, "bits_per_byte"),
    ],
)
def test_alike_in_many_seeds(rows, units, decides, record_property):
    found = called_different(rows, units, decides=decides, seeds=1000)
    record_property(decides, found)
    assert found <= 0.05 + 2 * 0.0069  # standard errors


def test_the_better_one_is_named_by_how_much():
    generator = np.random.default_rng(0)
    one, other = written(generator, 1.0), written(generator)
    found = compare_scores(one, other, BY_UNIT)
    assert found.decides == "bits_per_byte"
    assert found.better == "first"  # lower is better
    said = verdict(found, "A", "B")
    assert said.startswith("A is better than B: bits per byte is lower by 0.")
    assert compare_scores(other, one, BY_UNIT).better == "second"
    found = compare_scores(labelled(generator, 0.3), labelled(generator), BY_ROW)
    assert found.test == "McNemar, exact"
    assert "accuracy is higher by" in verdict(found, "A", "B")
    found = compare_scores(one, one, BY_UNIT)
    assert found.p_value == 1
    assert verdict(found, "A", "B").startswith("No difference in bits per byte is shown")


def test_mcnemar_counts_only_rows_that_differ():
    right = np.ones(100)
    assert mcnemar(right, right) == 1.0
    five = np.where(np.arange(100) < 5, 0.0, 1.0)
    assert mcnemar(right, five) == pytest.approx(2 / 2**5)
    six = np.where(np.arange(100) < 6, 0.0, 1.0)
    assert mcnemar(six, right) == pytest.approx(2 / 2**6)


def test_perplexity_of_other_tokens_is_not_compared():
    generator = np.random.default_rng(0)
    one, other = written(generator), written(generator)
    more = {**other.numbers, "tokens": other.numbers["tokens"] + 1}
    assert "perplexity" in compare_scores(one, other, BY_UNIT, resamples=100).first
    found = compare_scores(one, Scores(numbers=more), BY_UNIT, resamples=100)
    assert list(found.first) == ["bits_per_byte"]


def test_what_cannot_be_compared_is_refused():
    generator = np.random.default_rng(0)
    one, other = labelled(generator), labelled(generator)
    with pytest.raises(ModelError, match="other labels"):
        compare_scores(one, Scores(numbers=other.numbers, labels=("a", "b", "d")), BY_ROW)
    with pytest.raises(ConfigurationError, match=r"--by = 'f1': expected one of accuracy"):
        compare_scores(one, other, BY_ROW, decides="f1")


def test_models_and_the_command(tmp_path):
    base = build_base(tmp_path / "base")
    run(make_step(base, tmp_path, "sft", train={"max_steps": 20}), out=tmp_path / "out")
    run(make_step(base, tmp_path, "reward"), out=tmp_path / "out")
    trained = str(tmp_path / "out" / "sft" / "model")
    rows = [{**row, "n": number} for number, row in enumerate(ROWS["sft"] * 4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    asked = ["compare", trained, str(base), "--data", str(data), "--no-generate"]
    told = CliRunner().invoke(app, [*asked, "--json", "--out", str(tmp_path / "found")])
    assert told.exit_code == 0, told.output
    written = json.loads(told.stdout)
    assert written == json.loads((tmp_path / "found" / "comparison.json").read_text())
    assert written["better"] == trained
    assert written["p_value"] < 0.05
    told = CliRunner().invoke(app, ["compare", trained, trained, *asked[3:]])
    assert "No difference" in told.output
    with pytest.raises(ModelError, match="a language and a reward model"):
        compare_models(
            open_model(trained),
            open_model(str(tmp_path / "out" / "reward" / "model")),
            Asked(data=data),
            QUIET,
        )
