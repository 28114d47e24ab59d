"""A site's folder: made once, for its owner only."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import ConfigurationError, InvalidValue

CONFIG = SiteConfig(name="st-mary")


def test_the_folder_holds_keys_and_configuration_for_its_owner_only(tmp_path):
    folder = SiteFolder.create(tmp_path / "site", CONFIG)
    assert folder.config() == CONFIG
    assert len(folder.identity().public_key) == 32
    key = load_ssh_private_key(folder.fleet_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert key.public_key() == load_ssh_public_key(folder.fleet_public_key.read_bytes())
    for path in [folder.root, *folder.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_making_it_again_changes_nothing(tmp_path):
    folder = SiteFolder.create(tmp_path / "site", CONFIG)
    before = {path: path.read_bytes() for path in folder.root.iterdir() if path.is_file()}
    assert SiteFolder.create(tmp_path / "site", CONFIG) == folder
    assert {path: path.read_bytes() for path in before} == before


def test_the_folder_of_another_site_is_not_taken(tmp_path):
    SiteFolder.create(tmp_path / "s", CONFIG)
    with pytest.raises(ConfigurationError, match="is the folder of site 'st-mary'"):
        SiteFolder.create(tmp_path / "s", SiteConfig(name="other"))


def test_what_is_none_or_is_open_to_others_is_not_loaded(tmp_path):
    with pytest.raises(ConfigurationError, match="site init"):
        SiteFolder.load(tmp_path / "none")
    folder = SiteFolder.create(tmp_path / "site", CONFIG)
    folder.root.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 0700"):
        SiteFolder.load(folder.root)


def test_every_path_lies_in_the_folder(tmp_path):
    folder = SiteFolder(root=tmp_path)
    names = [n for n, v in vars(SiteFolder).items() if isinstance(v, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(set(paths)) == len(paths) > 15
    assert all(tmp_path in path.parents for path in paths)


def test_the_configuration_is_written_as_it_is_read(tmp_path):
    folder = SiteFolder.create(tmp_path / "site", CONFIG)
    full = SiteConfig(
        name="a.b_c-1", address="https://h:1", coordinator="0a" * 32, device="cuda",
        physical_batch=8, held_out=0.25, status_port=9100,
    )  # fmt: skip
    folder.write_config(full)
    assert folder.config() == full


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "../x"},
        {"name": "x" * 65},
        {"address": "http://h:1"},
        {"coordinator": "xyz"},
        {"physical_batch": 0},
        {"held_out": 0.6},
        {"status_port": 70000},
    ],
)
def test_a_senseless_configuration_is_refused(change):
    with pytest.raises(InvalidValue):
        SiteConfig(**({"name": "ok"} | change))
