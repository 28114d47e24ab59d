"""docs/configuration.md says of every key of a plan what its docstring says, type and default."""

import dataclasses
import inspect
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedward.plan import Plan
from fedward.typed_toml import REST, parse

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    tuple: "list of text",
    Mapping: "name to number",
}


def sections(cls: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every section of a plan with its class, in the order of the file."""
    found = [(name, cls)]
    for field in dataclasses.fields(cls):
        for kind in (field.type, *typing.get_args(field.type)):
            if dataclasses.is_dataclass(kind):
                found += sections(kind, f"{name}.{field.name}".lstrip("."))
    return found


def type_of(hint: Any) -> str:
    """A type in the words of the page."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{option}`" for option in typing.get_args(hint))
    first = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
    origins: list[Any] = [typing.get_origin(kind) for kind in (hint, first)]
    many = next((origin for origin in origins if origin in (tuple, Mapping)), None)
    return TYPES[many or first]


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as a plan would spell it; empty for what may be left out."""
    if field.metadata.get(REST) or field.default is None:
        return ""
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


def table(cls: Any) -> str:
    """The table of one section, from its class."""
    arguments = str(inspect.getdoc(cls)).partition("Args:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    meanings = {name: " ".join(text.split()).replace("``", "`") for name, text in found}
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        kinds = (field.type, *typing.get_args(field.type))
        if any(map(dataclasses.is_dataclass, kinds)) and field.name not in meanings:
            continue  # a section of its own, with a heading
        if field.metadata.get(REST):
            key, kind = "any other", "PEFT's"
        elif any(map(dataclasses.is_dataclass, kinds)):
            key, kind = f"`{field.name}`", "section"
        else:
            key, kind = f"`{field.name}`", type_of(field.type)
        rows.append(f"| {key} | {kind} | {default_of(field)} | {meanings[field.name]} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(("name", "cls"), sections(Plan))
def test_every_section_is_on_the_page_as_the_code_has_it(name, cls):
    heading = f"## `[{name}]`" if name else "## The plan itself"
    chapter = PAGE.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    assert table(cls) in chapter, f"docs/configuration.md needs {heading} with\n\n{table(cls)}"


def test_the_page_has_no_other_section():
    headings = re.findall(r"^## `\[(.+)\]`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [name for name, _ in sections(Plan) if name]


def test_the_example_on_the_page_is_a_plan():
    example = PAGE.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    assert parse(Plan, tomllib.loads(example)).name == "discharge-summaries"
