"""A site that is well: everything in its folder is there and right."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from fedward.client.data_sources import Columns, DataSource, add_model
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import add_source
from fedward.identity import Identity, Member, Roster, seal_roster
from fedward.private_files import write_private
from fedward.typed_toml import dump
from tests.simulations import tiny


def source(path: Path, /, **changes: Any) -> DataSource:
    """Records as the tests write them: what a plan may read, and who a patient is."""
    columns = Columns(names={"text": "text", "label": "label"})
    return dataclasses.replace(
        DataSource(path=str(path), unit="patient", columns=columns), **changes
    )


def declare(folder: SiteFolder, *names: str, **changes: Any) -> None:
    """Declare data sources whose records nobody will read."""
    for name in names or ("notes",):
        text = dump(source(Path("/records") / name, **changes))
        write_private(folder.data / f"{name}.toml", text.encode())


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
            held_out=0.0,
        )
    )
    tiny.write_data(tmp_path / "records", tiny.make_rows("a", 4))
    add_source(folder, "notes", source(tmp_path / "records"))
    shutil.copytree(base, tmp_path / "model")
    digest = add_model(folder, tmp_path / "model")
    policy = f'max_epsilon = 8.0\ndelta = 1e-5\nmax_rounds = 9\nmodels = ["{digest}"]\n'
    write_private(folder.policy, f'{policy}datasets = ["notes"]\n'.encode())
    return folder
