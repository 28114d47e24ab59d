"""``fedward privacy plan``: every answer beside a second accountant's and the note's tables."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from fedward.attempt import Attempt
from fedward.cli import app
from fedward.errors import ConfigurationError, FedwardError, InvalidValue, LedgerError
from fedward.identity import Identity
from fedward.plan import Data, Metrics, Model, Plan, Privacy, Rounds
from fedward.privacy import planning
from fedward.privacy.accounting import SampledGaussian, epsilon, noise_multiplier
from fedward.privacy.ledger import Ledger
from fedward.privacy.planned import metric_event, training_event
from fedward.privacy.planning import Answer, Question, answer, ask, pld_epsilon, record_epsilon

FIVE: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-6, "sampling_rate": 0.02, "steps": 5, "rounds": 8
}  # fmt: skip
PLAN = Plan(
    name="plan",
    model=Model(path="m"),
    data=Data(unit="patient"),
    rounds=Rounds(count=8, steps=5, sampling_rate=0.02, normaliser=1.0, learning_rate=1.0),
    privacy=Privacy(epsilon=4.0, delta=1e-6),
)


def event(sigma: float, rate: float, steps: int) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


@pytest.fixture
def one_accountant(monkeypatch):
    """The second is dear; what it says is checked in the first tests."""
    monkeypatch.setattr(planning, "_has_pld", lambda: False)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "prv", "pld"),
    [
        (1.0, 0.02, 100, 1.438, 1.427),
        pytest.param(1.2, 0.1, 200, 7.22, 7.21, marks=pytest.mark.slow),
        pytest.param(0.6, 0.01, 1000, 7.44, 7.43, marks=pytest.mark.slow),
        pytest.param(2.0, 1.0, 20, 11.49, 11.48, marks=pytest.mark.slow),
    ],
)
def test_the_notes_table_of_epsilons(sigma, rate, steps, prv, pld):
    """reference/differential-privacy.md §6, both columns, as the command gives them."""
    question = Question(sigma=sigma, delta=1e-5, sampling_rate=rate, steps=steps, rounds=1, spare=0)
    found = answer(question)
    assert found.epsilon == pytest.approx(prv, abs=6e-3)
    assert found.epsilon_pld is not None
    assert found.epsilon_pld == pytest.approx(pld, abs=6e-3)
    assert found.epsilon_pld < found.epsilon < found.epsilon_renyi


@pytest.mark.slow
@pytest.mark.parametrize(
    ("records", "cost"), [(1, 1.85), (2, 3.99), (4, 8.75), (8, 19.96), (16, 48.5)]
)
def test_the_notes_table_of_records(records, cost):
    """§7: record-level epsilon 1.85, and what a patient with k notes pays."""
    found = record_epsilon([event(1.0, 0.02, 200)], records, 1e-5)
    assert found == pytest.approx(cost, abs=0.03)


@pytest.mark.slow
def test_at_rate_one_all_records_come_together():
    """Twice the sensitivity is half of the noise."""
    two = record_epsilon([event(4.0, 1.0, 3)], 2, 1e-5)
    assert two == pytest.approx(pld_epsilon([event(2.0, 1.0, 3)], 1e-5), abs=1e-4)
    assert two != pytest.approx(pld_epsilon([event(2.2, 1.0, 3)], 1e-5), abs=1e-2)


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [
        (4.0, 0.1, 2),
        pytest.param(8.0, 0.02, 20, marks=pytest.mark.slow),
        pytest.param(0.5, 1.0, 1, marks=pytest.mark.slow),
    ],
)
def test_the_noise_for_an_epsilon_holds_by_both_accountants(target, rate, steps):
    question = Question(
        epsilon=target, delta=1e-6, sampling_rate=rate, steps=steps, rounds=8, spare=2
    )
    found = answer(question)
    sigma = noise_multiplier(epsilon=target, delta=1e-6, sampling_rate=rate, steps=10 * steps)
    assert found.noise_multiplier == sigma
    assert found.epsilon_pld is not None
    assert found.epsilon <= target
    assert found.epsilon - 0.015 < found.epsilon_pld <= target
    # Negative control: a tenth less noise does not keep to it, by the other accountant either.
    assert pld_epsilon([event(0.9 * sigma, rate, 10 * steps)], 1e-6) > target


def test_a_plan_is_answered_as_its_sites_compute_it(one_accountant):
    plan = Plan(**{**vars(PLAN), "metrics": Metrics(epsilon=1.0)})
    found = answer(ask(plan, {}), units=300)
    metrics = metric_event(plan)
    assert metrics is not None
    assert found.events == (training_event(plan), metrics)
    assert found.epsilon == epsilon([e.times(10) for e in found.events], 1e-6) > 4.0
    assert found.expected_draw == pytest.approx(6.0)
    assert found.question.unit == "patient"
    assert found.neighbours == "one patient, with all its records, added or removed"
    [warning] = found.warnings
    assert "draws 6 units on average, below 8" in warning
    assert answer(ask(PLAN, {}), units=400).warnings == ()


def test_without_a_unit_each_record_is_one_and_that_is_said(one_accountant):
    plan = Plan(**{**vars(PLAN), "data": Data()})
    found = answer(ask(plan, {}))
    assert found.question.unit == "record"
    assert "a patient with several is protected less" in found.warnings[0]


def test_options_replace_the_plans_values(one_accountant):
    question = ask(PLAN, {"sigma": 2.0, "rounds": 3})
    assert (question.sigma, question.rounds, question.spare) == (2.0, 3, 2)
    assert answer(question).noise_multiplier == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": None}, "--epsilon"),
        ({"epsilon": 0.0}, "^epsilon = "),
        ({"epsilon": float("inf")}, "^epsilon = "),
        ({"sigma": -1.0}, "^sigma = "),
        ({"rounds": 0}, "^rounds = "),
        ({"spare": -1}, "^spare = "),
        ({"steps": 0}, "^steps = "),
        ({"delta": 1.0}, "^delta = "),
        ({"sampling_rate": 2.0}, "^sampling_rate = "),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        answer(Question(**{**FIVE, **changes}))


def test_counts_below_one_are_refused():
    with pytest.raises(InvalidValue, match="units = 0"):
        answer(Question(**FIVE), units=0)
    with pytest.raises(InvalidValue, match="records = 0"):
        answer(Question(**FIVE), records=0)


def test_a_plan_without_privacy_is_refused_unless_noise_is_given():
    naked = Plan(**{**vars(PLAN), "privacy": Privacy(epsilon=float("inf"))})
    with pytest.raises(InvalidValue, match="epsilon = inf"):
        ask(naked, {})
    assert ask(naked, {"sigma": 1.0}).sigma == 1.0


def test_several_records_need_the_second_accountant(monkeypatch):
    monkeypatch.setattr(planning, "_has_pld", lambda: False)
    assert answer(Question(**FIVE)).epsilon_pld is None
    with pytest.raises(ConfigurationError, match=r"fedward\[accounting\]"):
        answer(Question(**FIVE), records=2)


@pytest.fixture
def site(tmp_path, one_accountant):
    """A site's folder with one run of which two rounds have left."""
    identity = Identity.load_or_create(tmp_path / "key")
    (tmp_path / "policy.toml").write_text("max_epsilon = 6.0\ndelta = 1e-6\nmore = 1\n")
    ledger = Ledger.open(tmp_path / "ledger.jsonl", identity, epsilon=6.0, delta=1e-6)
    ledger.open_run("first", b"p" * 32, event(1.0, 0.05, 10), 6)
    for number in (1, 2):
        ledger.reserve(Attempt(run="first", round=number))
        ledger.mark_sent(Attempt(run="first", round=number))
    yield tmp_path, ledger
    ledger.close()


def options(**changes: Any) -> list[str]:
    given = {"epsilon": 4, "delta": 1e-6, "rate": 0.05, "steps": 10, "rounds": 4} | changes
    return ["privacy", "plan", *(f"--{key}={value}" for key, value in given.items())]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_site_is_told_what_is_left(site):
    """While the site holds its ledger: nothing is locked and nothing written."""
    folder, ledger = site
    before = (folder / "ledger.jsonl").read_bytes()
    done = call(*options(site=folder), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    here = found["site"]
    assert here["runs"] == [{"run": "first", "spent": 2, "left": 4, "closed": False}]
    assert here["spent"] == pytest.approx(ledger.epsilon_spent())
    assert here["committed"] == pytest.approx(epsilon([event(1.0, 0.05, 60)], 1e-6))
    assert here["alone"] == here["spent"] < here["committed"] < here["cap"] == 6.0
    sigma = found["noise_multiplier"]
    assert here["rounds_left"] == ledger.room([event(sigma, 0.05, 10)])
    ledger.open_run("second", b"q" * 32, event(sigma, 0.05, 10), here["rounds_left"])
    assert (folder / "ledger.jsonl").read_bytes().startswith(before)


def test_a_ledgers_file_will_do(site):
    folder, _ = site
    where = {"ledger": folder / "ledger.jsonl", "key": folder / "key"}
    by_file = json.loads(call(*options(**where, cap=6), "--json").output)["site"]
    assert by_file == json.loads(call(*options(site=folder), "--json").output)["site"]
    capped = json.loads(call(*options(**where), "--json").output)["site"]
    assert capped["cap"] == 4.0
    assert capped["rounds_left"] < by_file["rounds_left"]


def test_a_new_site_has_all_of_its_cap(tmp_path, one_accountant):
    (tmp_path / "policy.toml").write_text("max_epsilon = 4.0\ndelta = 1e-6\n")
    found = json.loads(call(*options(site=tmp_path), "--json").output)["site"]
    assert (found["runs"], found["spent"], found["committed"]) == ([], 0.0, 0.0)
    assert found["rounds_left"] == 6  # as many as were asked for: 4 and 2 spare


def failed(*arguments: str) -> FedwardError:
    error = call(*arguments).exception
    assert isinstance(error, FedwardError)
    return error


def test_a_wrong_ledger_is_refused_with_its_line(site):
    folder, _ = site
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    (folder / "copy").write_bytes(b"".join([*lines[:2], *lines[3:]]))
    error = failed(*options(ledger=folder / "copy", key=folder / "key"))
    assert isinstance(error, LedgerError)
    assert "line 3 does not follow" in str(error)


def test_options_that_do_not_fit_are_refused(site):
    folder, _ = site
    ledger = folder / "ledger.jsonl"
    assert "--key" in str(failed(*options(ledger=ledger)))
    assert "--site alone" in str(failed(*options(ledger=ledger, site=folder, key=folder / "key")))
    assert "policy.toml" in str(failed(*options(site=folder / "none")))
    assert "--delta, --steps, --rounds" in str(failed("privacy", "plan", "--rate=0.1"))


@pytest.mark.slow
def test_the_table_says_unit_neighbours_and_every_answer(site, monkeypatch):
    folder, _ = site
    monkeypatch.setattr(planning, "_has_pld", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    done = call(*options(rate=1, steps=1, site=folder, units=5, records=2))
    assert done.exit_code == 0
    shown = " ".join(done.output.replace("│", " ").split())
    found: Answer = answer(ask(None, FIVE | {"sampling_rate": 1.0, "steps": 1, "rounds": 4}))
    assert "one patient, with all its records, added or removed" in shown
    assert f"noise multiplier {found.noise_multiplier:g} clips" in shown
    assert f"epsilon (PRV) {found.epsilon:.3f}" in shown
    assert f"(PLD) {found.epsilon_pld:.3f}" in shown
    assert "a patient with 2 records, each its own unit" in shown
    assert "expected draw of 5 units 5 a step" in shown
    assert "warning: a step draws 5 units" in shown
    assert "first 2 4 no" in shown


@pytest.mark.slow
def test_the_plot_is_a_picture_of_both_curves(tmp_path, one_accountant):
    path = tmp_path / "plot.png"
    short = options(rounds=1, steps=1, rate=1)
    done = call(*short, f"--plot={path}", "--json")
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")
    found = answer(ask(None, FIVE | {"rounds": 2, "spare": 0}))
    over_rounds, over_sigma = planning.curves(found, points=3)
    assert over_rounds[-1] == (2.0, found.epsilon)
    assert over_sigma[1] == (found.noise_multiplier, found.epsilon)
    assert over_sigma[0][1] > found.epsilon > over_sigma[2][1]
    assert "cannot be written" in str(failed(*short, f"--plot={tmp_path / 'no' / 'x.png'}"))


def test_a_plan_file_is_read(tmp_path, one_accountant):
    path = tmp_path / "plan.toml"
    path.write_text(
        'name = "x"\n[model]\npath = "m"\n[rounds]\ncount = 3\nsteps = 1\nsampling_rate = 1.0\n'
        "normaliser = 1\nlearning_rate = 0.1\n[privacy]\nepsilon = 2.0\n"
    )
    found = json.loads(call("privacy", "plan", str(path), "--json").output)
    assert found["question"]["epsilon"] == 2.0
    assert found["question"]["unit"] == "record"
    assert len(found["warnings"]) == 1
