import pytest

from tests.simulations.tiny import build_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the tiny Llama."""
    return build_base(tmp_path_factory.getbasetemp() / "tiny-llama")
