"""Every tuner against brute force, and the docs' table of it."""

import pytest

from fedward.privacy.coverage import coverage
from tests.privacy import exactness
from tests.privacy.exactness import BASES, CHECKPOINTING, METHODS, NOWHERE, SINGLE, TOLERANCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_exact(name):
    make, how, _ = METHODS[name]
    assert coverage(make("fp32")).single_pass == (how == SINGLE)
    assert exactness.error(name, "fp32", "none") < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "base", "checkpointing"), [c for c in exactness.cells() if c[1:] != ("fp32", "none")]
)
def test_every_method_on_every_base_with_every_checkpointing(name, base, checkpointing):
    assert exactness.error(name, base, checkpointing) < TOLERANCE


def test_the_page_has_every_cell_and_each_is_exact():
    header, _, *lines = exactness.on_page().splitlines()
    assert header == exactness.table({}).splitlines()[0]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[1]) for row in rows] == [(name, m[1]) for name, m in METHODS.items()]
    found = {
        (row[0], base, way): value
        for row in rows
        for base, text in zip(BASES, row[2:], strict=True)
        if text != NOWHERE
        for way, value in zip(CHECKPOINTING, text.split(", "), strict=True)
        if value != NOWHERE
    }
    assert set(found) == set(exactness.cells())
    assert all(float(value) < TOLERANCE for value in found.values())
    assert f"**{len(found)} cells, largest error" in exactness.PAGE.read_text()
