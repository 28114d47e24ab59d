"""A site that is well: everything in its folder is there and right."""

import shutil
from pathlib import Path

from fedward.client.data_sources import DataSource, add_model, add_source
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.identity import Identity, Member, Roster, seal_roster
from fedward.private_files import write_private
from tests.simulations import tiny


def make_site(tmp_path: Path, base: Path) -> SiteFolder:
    """A site that is enrolled among three, with a model, records and a policy."""
    folder = SiteFolder.create(tmp_path / "site", SiteConfig(name="north"))
    coordinator = Identity(bytes([7]) * 32)
    keys = {"north": folder.identity().public_key}
    for name in ("east", "west"):
        keys[name] = Identity().public_key
    members = tuple(
        Member(id=number, name=name, public_key=key)
        for number, (name, key) in enumerate(keys.items())
    )
    roster = Roster(epoch=1, coordinator=coordinator.public_key, members=members)
    write_private(folder.roster, seal_roster(roster, coordinator))
    folder.write_config(
        SiteConfig(
            name="north",
            address="https://127.0.0.1:1",
            coordinator=coordinator.public_key.hex(),
        )
    )
    tiny.write_data(tmp_path / "records", tiny.make_rows("a", 4))
    add_source(folder, "notes", DataSource(path=str(tmp_path / "records"), unit="patient"))
    shutil.copytree(base, tmp_path / "model")
    digest = add_model(folder, tmp_path / "model")
    policy = f'max_epsilon = 8.0\ndelta = 1e-5\nmax_rounds = 9\nmodels = ["{digest}"]\n'
    write_private(folder.policy, f'{policy}datasets = ["notes"]\n'.encode())
    return folder
