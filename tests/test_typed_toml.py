"""The TOML loader on its own: files that cannot be read, and values of the wrong shape."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fedward.errors import ConfigurationError
from fedward.typed_toml import REST, dump, load, parse, parse_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Free:
    kind: str = "a"
    others: Mapping[str, Any] = field(default_factory=dict, metadata={REST: True})


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    inner: Inner | None = None
    free: Free = field(default_factory=Free)
    bits: Literal[8, 16] = 8
    switch: bool = False


def read(tmp_path: Path, content: str | bytes) -> Outer:
    path = tmp_path / "file.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load(Outer, path)


def test_a_file_becomes_a_dataclass(tmp_path):
    content = """
        count = 1
        bits = 16
        switch = true
        inner = { width = 2, names = ["a", "b"] }
        [free]
        deep = { x = [1] }
        others = 3
    """
    assert read(tmp_path, content) == Outer(
        count=1,
        bits=16,
        switch=True,
        inner=Inner(width=2.0, names=("a", "b")),
        free=Free(others={"deep": {"x": [1]}, "others": 3}),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"count = 1 # \xff", "cannot be read as UTF-8 text"),
        ("count = ", "not valid TOML"),
        ("count = 1\ncount = 2", "not valid TOML"),
        ("count = " + "1" * 5000, "not valid TOML"),
        ("count = " + "[" * 100_000, "not valid TOML"),
        ("", "missing key 'count'"),
        ("cuont = 1", "unknown key 'cuont'; did you mean 'count'?"),
        ("zzz = 1", "unknown key 'zzz'; known keys: count, inner, free, bits, switch"),
        ("count = 1.0", "count = 1.0: expected a whole number"),
        ("count = true", "count = True: expected a whole number"),
        ("count = 2024-01-01", "expected a whole number"),
        ("count = 1\nswitch = 1", "switch = 1: expected true or false"),
        ("count = 1\nbits = 8.0", "bits = 8.0: expected one of 8, 16"),
        ("count = 1\nbits = 32", "bits = 32: expected one of 8, 16"),
        ("count = 1\nbits = []", "bits = []: expected one of 8, 16"),
        ("count = 1\ninner = 3", "inner = 3: expected a section"),
        ("count = 1\n[[inner]]\nwidth = 1", "expected a section"),
        ("count = 1\n[inner]", "[inner] missing key 'width'"),
        ("count = 1\n[inner]\nwidht = 1", "[inner] unknown key 'widht'; did you mean 'width'?"),
        ("count = 1\n[inner]\nwidth = true", "[inner] width = True: expected a number"),
        ("count = 1\n[inner]\nwidth = nan", "[inner] width = nan: expected a number"),
        ("count = 1\n[inner]\nwidth = 1" + "0" * 400, "expected a number that a float holds"),
        ("count = 1\n[inner]\nwidth = 1\nnames = 'a'", "[inner] names = 'a': expected a list"),
        ("count = 1\n[inner]\nwidth = 1\nnames = ['a', 1]", "[inner] names = 1: expected text"),
        ("count = 1\n[free]\nkind = 1", "[free] kind = 1: expected text"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_fault(tmp_path, content, message):
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'file.toml'}: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.toml: no such file"):
        load(Outer, tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(Outer, tmp_path)


def test_null_in_json_means_left_out():
    assert parse_json(Outer, b'{"count": 1, "inner": null}') == Outer(count=1)


def test_a_section_in_json_is_an_object():
    with pytest.raises(ConfigurationError, match="inner = 5: expected a section"):
        parse_json(Outer, b'{"count": 1, "inner": 5}')


def test_the_rest_survives_json():
    expected = Outer(count=1, free=Free(others={"x": 1, "others": 2}))
    assert (
        parse_json(Outer, b'{"count":1,"free":{"kind":"a","others":{"x":1,"others":2}}}')
        == expected
    )


def test_parse_names_the_section_it_is_given():
    with pytest.raises(ConfigurationError, match=r"^\[here\] missing key 'width'$"):
        parse(Inner, {}, "here")


@dataclass(frozen=True, kw_only=True)
class Flat:
    text: str
    number: float
    whole: int = 1
    yes: bool = True
    several: tuple[str, ...] = ()
    nothing: str | None = None


@pytest.mark.parametrize(
    "value",
    [
        Flat(text='quotes " and \\ and\nü\x01 and 🏥', number=math.inf),
        Flat(text="", number=1e-6, whole=-3, yes=False, several=("a", "b c"), nothing="x"),
    ],
)
def test_what_is_dumped_reads_back_equal(value):
    assert parse(Flat, tomllib.loads(dump(value))) == value
