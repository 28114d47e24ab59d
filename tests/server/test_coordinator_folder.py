"""The coordinator's folder: made once, for its owner only."""

import stat

import pytest

from fedward.errors import ConfigurationError, InvalidValue
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder

CONFIG = CoordinatorConfig(host="fed.example.org")


def test_the_folder_holds_key_and_configuration_for_its_owner_only(tmp_path):
    folder = CoordinatorFolder.create(tmp_path / "c", CONFIG)
    assert folder.config() == CONFIG
    assert len(folder.identity().public_key) == 32
    for path in [folder.root, *folder.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_making_it_again_changes_nothing_and_another_host_is_refused(tmp_path):
    folder = CoordinatorFolder.create(tmp_path / "c", CONFIG)
    key = folder.key.read_bytes()
    assert CoordinatorFolder.create(tmp_path / "c", CONFIG) == folder
    assert folder.key.read_bytes() == key
    with pytest.raises(ConfigurationError, match=r"https://fed\.example\.org:9443"):
        CoordinatorFolder.create(tmp_path / "c", CoordinatorConfig(host="other.org"))


def test_what_is_none_or_is_open_to_others_is_not_loaded(tmp_path):
    with pytest.raises(ConfigurationError, match="coordinator init"):
        CoordinatorFolder.load(tmp_path / "none")
    folder = CoordinatorFolder.create(tmp_path / "c", CONFIG)
    folder.root.chmod(0o750)
    with pytest.raises(ConfigurationError, match="chmod 0700"):
        CoordinatorFolder.load(folder.root)


def test_every_path_lies_in_the_folder(tmp_path):
    folder = CoordinatorFolder(root=tmp_path)
    names = [n for n, v in vars(CoordinatorFolder).items() if isinstance(v, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(set(paths)) == len(paths) > 10
    assert all(tmp_path in path.parents for path in paths)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("fed.example.org", "https://fed.example.org:9443"),
        ("127.0.0.1", "https://127.0.0.1:9443"),
        ("::1", "https://[::1]:9443"),
    ],
)
def test_the_address_is_the_one_that_sites_use(host, address):
    assert CoordinatorConfig(host=host).address == address


@pytest.mark.parametrize(
    "change",
    [
        {"host": ""},
        {"host": "a_b"},
        {"host": "Upper.org"},
        {"host": "https://x"},
        {"listen": "localhost"},
        {"port": 0},
        {"port": 70000},
        {"away": -1},
        {"away": 4000},
        {"runs_at_once": 0},
        {"runs_at_once": 17},
        {"max_letter": 0},
        {"max_letter": 4097},
    ],
)
def test_a_senseless_configuration_is_refused(change):
    with pytest.raises(InvalidValue):
        CoordinatorConfig(**({"host": "fed.example.org"} | change))
