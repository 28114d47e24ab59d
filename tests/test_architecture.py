"""The house of DESIGN §2: which rooms there are, who may import whom, and how long a module is."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fedward"
MAY_IMPORT = {
    "privacy": set(),
    "aggregation": {"privacy"},
    "tuning": set(),
    "client": {"aggregation", "privacy", "tuning"},
    "server": {"aggregation", "privacy", "tuning"},
    "simulations": {"aggregation", "client", "privacy", "server", "tuning"},
}
LEAVES = {
    "attempt",
    "canonical",
    "enrolment",
    "errors",
    "failpoints",
    "identity",
    "local_ray",
    "messages",
    "plan",
    "plan_aggregation",
    "plan_fallback",
    "plan_gate",
    "plan_task",
    "plan_tuner",
    "private_files",
    "typed_toml",
}
"""Root modules that import no room. cli.py and __main__.py put the rooms together."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every ``fedward`` module that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fedward")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedward":
            if node.module == "fedward":
                yield from (f"fedward.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def offences(path: Path, names: Iterable[str]) -> list[str]:
    """The imports of a file that its place in the house does not allow."""
    place = path.relative_to(PACKAGE).parts
    allowed = LEAVES | {"__version__"}
    if len(place) > 1:
        allowed = allowed | MAY_IMPORT[place[0]] | {place[0]}
    elif path.stem not in LEAVES | {"__init__"}:
        allowed = allowed | set(MAY_IMPORT) | {"cli"}
    return [f"{path} imports {name}" for name in names if name.split(".")[1:2][0] not in allowed]


def test_the_rooms_are_the_rooms():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)


def test_no_room_imports_what_it_may_not():
    found = [line for path in modules() for line in offences(path, imported(path))]
    assert not found, "\n".join(found)


def test_an_offence_is_found():
    assert offences(PACKAGE / "client" / "x.py", ["fedward.server.rounds"])
    assert offences(PACKAGE / "plan.py", ["fedward.privacy"])


def test_no_module_is_longer_than_400_lines():
    long = [f"{p}: {n}" for p in modules() if (n := len(p.read_text().splitlines())) > 400]
    assert not long, "\n".join(long)


def test_no_module_is_a_drawer():
    drawers = {"utils", "common", "base", "helpers", "manager", "misc"}
    assert not [path for path in modules() if path.stem in drawers]
