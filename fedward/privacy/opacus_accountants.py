"""Opacus's accountants without the rest of Opacus.

``import opacus`` loads torch, some seconds and some hundred megabytes, although its accountants
compute with numpy and scipy alone. A hospital's agent accounts, has a network and no use for torch.
So the folder of the accountants is loaded as a package of its own; the one module in it that asks
for the optimizers, for a hook that nobody here uses, is left out.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_NAME = "fedward_opacus_accountants"


class _Accountant:
    """What Opacus's accountants have of their base class."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


def _load() -> tuple[Callable[[], Any], Callable[..., Any]]:
    spec = find_spec("opacus")  # finds it, runs nothing of it
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("opacus is not installed", name="opacus")
    package = ModuleType(_NAME)
    package.__path__ = [f"{folder}/accountants" for folder in spec.submodule_search_locations]
    base = ModuleType(f"{_NAME}.accountant")
    vars(base)["IAccountant"] = _Accountant
    sys.modules[_NAME], sys.modules[base.__name__] = package, base
    prv, rdp = import_module(f"{_NAME}.prv"), import_module(f"{_NAME}.analysis.rdp")
    return prv.PRVAccountant, rdp.compute_rdp


PRVAccountant, compute_rdp = _load()
"""As in :mod:`opacus.accountants` and :mod:`opacus.accountants.analysis.rdp`."""
