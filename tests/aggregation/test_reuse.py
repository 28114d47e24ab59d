"""The detector of reused masks sees every site, and notices a mask on two inputs."""

import numpy as np
import pytest

from tests import conftest
from tests.aggregation.rig import make_rig
from tests.client.desk import Desk


def test_each_mask_of_a_session_is_seen_once():
    before = set(conftest.USED)
    make_rig(4, secrets="seen").run()
    found = set(conftest.USED) - before
    signs = [sign for _, sign in found]
    assert signs.count("+") == 4 + 6, "a self mask a site, and each pair's mask once"
    assert signs.count("-") == 6


def test_sites_of_other_folders_are_seen_too(tmp_path):
    before = len(conftest.USED)
    desk = Desk(tmp_path)
    desk.round(1)
    desk.close()
    assert len(conftest.USED) - before == 3 + 2 * 3


def test_a_site_whose_randomness_repeats_is_caught():
    """Negative control: the same secrets for another input, as a snapshot would have them."""
    make_rig(3, secrets="repeats").run()
    again = make_rig(3, secrets="repeats")
    again.inputs[1] = again.inputs[1] + np.uint32(1)
    with pytest.raises(AssertionError, match="covers two inputs"):
        again.run()
