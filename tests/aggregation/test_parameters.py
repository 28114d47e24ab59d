"""Parameters: one byte string for one session, nothing else accepted, limits all named."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.parameters import Limits, SessionParameters, Slot
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import InvalidValue, ProtocolError
from tests.aggregation.rig import make_parameters, make_roster

ROSTER = make_roster((1, 2, 3, 4))
PARAMETERS = make_parameters(
    ROSTER, slots=(Slot(name="loss", clip=4.0), Slot(name="units", clip=1e3)), noise=0.25
)
WEIGHED = make_parameters(ROSTER, weights=((1, 1.0), (2, 0.1), (4, 3.5)))


def test_round_trip():
    for parameters in (PARAMETERS, WEIGHED):
        assert SessionParameters.from_bytes(parameters.to_bytes()) == parameters
    most = make_parameters(ROSTER, weights=tuple((2**32 - 1 - s, 0.1) for s in range(1023, -1, -1)))
    assert SessionParameters.from_bytes(most.to_bytes()) == most, "the largest P is short enough"


def test_only_integers_and_strings():
    fields = json.loads(PARAMETERS.to_bytes())
    assert fields["gamma"] == PARAMETERS.grid.gamma.hex()
    for name, value in fields.items():
        assert type(value) in (int, str) or name == "slots"


def test_a_grid_given_as_an_integer_is_the_same_session():
    whole = make_parameters(ROSTER, grid=Grid(clip=1, sites=4, word_bits=32))
    assert whole.to_bytes() == make_parameters(ROSTER).to_bytes()


@pytest.mark.parametrize("name", sorted(PARAMETERS.fields()))
def test_every_field_is_needed_and_typed(name):
    fields = PARAMETERS.fields()
    missing = {key: value for key, value in fields.items() if key != name}
    allowed = {"run": "x", "slots": []}  # other sessions, but possible ones
    bad_values: list[Any] = [None, True, 1.0, -1, "x", [], {}]
    changed = [{**fields, name: bad} for bad in bad_values if bad != allowed.get(name, ())]
    for wrong in (missing, *changed):
        with pytest.raises(ProtocolError):
            SessionParameters.from_bytes(canonical_json(wrong))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"{",
        b"[" * 60000,
        b" " + PARAMETERS.to_bytes(),
        PARAMETERS.to_bytes() + b"\n",
        PARAMETERS.to_bytes().replace(b'"bits":30', b'"bits":31'),
        PARAMETERS.to_bytes().replace(b'"proto":"secagg/1"', b'"proto":"secagg/0"'),
        PARAMETERS.to_bytes().replace(b'{"attempt"', b'{"a":1,"attempt"'),
        PARAMETERS.to_bytes().replace(b'"uniform"', b"[]"),
        PARAMETERS.to_bytes().replace(b'"uniform"', b'[[true,"0x1.0000000000000p+0"]]'),
        PARAMETERS.to_bytes().replace(b'"uniform"', b'[[1,"0x1p+0"]]'),
        PARAMETERS.to_bytes().replace(b'"uniform"', b'[[1,2,"0x1.0000000000000p+0"]]'),
        bytes(1 << 17),
    ],
    ids=range(16),
)
def test_anything_else_is_refused(data):
    with pytest.raises(ProtocolError):
        SessionParameters.from_bytes(data)


@given(st.binary(max_size=200))
def test_noise(data):
    with pytest.raises(ProtocolError):
        SessionParameters.from_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"minimum": 2},
        {"minimum": 3, "colluders": 2},
        {"minimum": 5},
        {"colluders": -1},
        {"dropouts": -1},
        {"dropouts": 5},
        {"dimension": -1},
        {"noise": float("nan")},
        {"noise": -1.0},
        {"deadline": 0},
        {"weights": ((2, 1.0), (1, 1.0))},
        {"weights": ((1, 1.0), (1, 1.0))},
        {"weights": ((1, 0.0),)},
        {"weights": ((1, float("nan")),)},
        {"weights": ((True, 1.0),)},
        {"weights": ((-1, 1.0),)},
        {"weights": tuple((site, 1.0) for site in range(1025))},
        {"roster_hash": b""},
        {"task_hash": bytes(31)},
        {"slots": (Slot(name="a", clip=1.0),) * 2},
    ],
)
def test_impossible_sessions(change):
    with pytest.raises(InvalidValue):
        make_parameters(ROSTER, **change)


@pytest.mark.parametrize("fields", [{"name": "", "clip": 1.0}, {"name": "a", "clip": 0.0}])
def test_impossible_slots(fields):
    with pytest.raises(InvalidValue):
        Slot(**fields)


def test_limits_give_every_reason_at_once():
    limits = Limits(colluders=1, minimum=4, sites=3, words=5, one_sum=True)
    with pytest.raises(ProtocolError) as caught:
        limits.check(make_parameters(make_roster(range(6)), minimum=3), make_roster(range(6)))
    assert str(caught.value).count(";") == 4


def test_limits_let_a_stricter_session_pass():
    strict = dataclasses.replace(PARAMETERS, colluders=2, minimum=4)
    Limits(colluders=1, minimum=3).check(strict, ROSTER)


@pytest.mark.parametrize("field", ["colluders", "minimum", "sites", "words"])
def test_impossible_limits(field):
    changes: dict[str, Any] = {field: -1}
    with pytest.raises(InvalidValue):
        Limits(**changes)


def test_attempts_of_two_rounds_have_different_parameters():
    other = dataclasses.replace(PARAMETERS, attempt=Attempt(run="run", round=2))
    assert other.to_bytes() != PARAMETERS.to_bytes()
