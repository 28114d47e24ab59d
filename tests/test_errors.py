"""The exception tree as its module draws it, and what the errors say."""

import inspect
import re

import pytest

from fedward import errors
from fedward.errors import ConfigurationError, FedwardError, InvalidValue, PolicyRefusal, SiteCode


def tree(root: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
    """Every class below ``root`` in this module, with its depth, parents before children."""
    found = [(depth, root.__name__)]
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            found += tree(child, depth + 1)
    return found


def test_the_drawn_tree_is_the_tree():
    drawn = re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)", str(inspect.getdoc(errors)), re.MULTILINE)
    assert [(len(lead) // 4, name) for lead, name in drawn] == tree(FedwardError)


def test_an_invalid_value_says_key_value_and_what_is_allowed():
    error = InvalidValue("rate", 2, "0 to 1")
    assert str(error) == "rate = 2: expected 0 to 1"
    assert (error.key, error.value, error.allowed) == ("rate", 2, "0 to 1")
    with pytest.raises(ConfigurationError):
        raise error


def test_a_refusal_says_every_reason():
    error = PolicyRefusal(["too long", "too dear"])
    assert error.reasons == ("too long", "too dear")
    assert str(error).splitlines()[1:] == ["  too long", "  too dear"]


def test_a_site_says_one_of_thirteen_codes():
    # What leaves a site is part of the protocol and of the guarantee: a new code needs thought.
    assert [str(code) for code in SiteCode] == [
        "ready",
        "done",
        "refused-signature",
        "refused-stale",
        "refused-plan",
        "refused-policy",
        "refused-budget",
        "refused-ledger",
        "data-unusable",
        "training-failed",
        "protocol-aborted",
        "internal",
    ]
