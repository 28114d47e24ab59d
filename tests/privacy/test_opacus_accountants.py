"""The accountants are Opacus's own, to the last bit, and come without torch."""

import subprocess
import sys
import warnings

import opacus.accountants
import opacus.accountants.analysis.rdp
import pytest

from fedward.privacy.opacus_accountants import PRVAccountant, compute_rdp

ALONE = """
import sys
from fedward.privacy.accounting import SampledGaussian, epsilon
event = SampledGaussian(noise_multiplier=1.0, sampling_rate=0.02, steps=100)
assert round(epsilon([event], delta=1e-5), 2) == 1.44
print([name for name in ("torch", "opacus") if name in sys.modules])
"""


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(0.8, 0.02, 100), (2.0, 1.0, 7)])
def test_the_numbers_are_opacus_s(sigma, rate, steps):
    theirs, ours = opacus.accountants.PRVAccountant(), PRVAccountant()
    found = []
    for accountant in (theirs, ours):
        accountant.history = [(sigma, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ln(1 - rate) at rate 1
            found.append(accountant.get_epsilon(1e-5, eps_error=0.01))
    assert found[0] == found[1]
    given = {"q": rate, "noise_multiplier": sigma, "steps": steps, "orders": [1.5, 2.0, 8.0]}
    expected = opacus.accountants.analysis.rdp.compute_rdp(**given)
    assert (compute_rdp(**given) == expected).all()


def test_accounting_loads_neither_torch_nor_the_rest_of_opacus():
    assert "torch" in sys.modules, "control: this process has loaded them"
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
