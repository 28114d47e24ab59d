"""docs/federated-methods.md has every cell of the matrix, and each does what it says."""

import pytest

from tests.simulations import matrix


@pytest.fixture(scope="module")
def page():
    return matrix.PAGE.read_text("utf-8")


def test_the_page_has_every_cell(page):
    head, _, *rows = page.split("<!-- matrix -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    assert [part.strip() for part in head.strip("|").split("|")][2:] == list(matrix.WAYS)
    named = [tuple(part.strip() for part in row.strip("|").split("|")[:2]) for row in rows]
    assert named == [(t, o) for t in matrix.TUNERS for o in matrix.OBJECTIVES]


def test_the_page_says_of_every_method_whether_sites_train_it(page):
    assert matrix.methods_table() in page


@pytest.mark.slow
def test_every_cell_is_as_the_page_says(page):
    assert matrix.table(matrix.run()) in page
