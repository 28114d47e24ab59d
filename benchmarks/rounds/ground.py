"""What both systems stand on: certificates and node keys of a coordinator and three sites."""

import datetime
import time
from dataclasses import dataclass
from pathlib import Path

from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.enrolment import EnrolRequest
from fedward.plan import Data, Model, Plan, Privacy, Rounds
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.private_files import write_private
from fedward.server.certificates import issue
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder
from fedward.server.members import open_members
from rounds.processes import free_port

SITES = ("northgate", "harbour", "valley")
TENSORS = 16
"""Tensors of an adapter, on either side."""

_DIGEST = "a" * 64  # there is no model: its place is taken by the fixed update
_POLICY = f"""max_epsilon = 1e9
delta = 1e-5
max_rounds = 100
models = ["{_DIGEST}"]
datasets = ["notes"]
minimum = 3
colluders = 1
automatic = true
"""
_SOURCE = """path = "none"  # no more than the model
unit = "patient"
[columns]
text = "text"
"""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Folders of a coordinator and its member sites.

    Args:
        coordinator: The coordinator's.
        sites: One each, enrolled, with a policy.
    """

    coordinator: CoordinatorFolder
    sites: tuple[SiteFolder, ...]


def prepare(root: Path) -> Ground:
    """Make keys, certificates and members; what travels when a site enrols goes by hand."""
    config = CoordinatorConfig(host="127.0.0.1", port=free_port(), listen="127.0.0.1")
    coordinator, now = CoordinatorFolder.create(root / "c", config), int(time.time())
    issue(coordinator, datetime.datetime.now(datetime.UTC))
    sites = tuple(SiteFolder.create(root / name, SiteConfig(name=name)) for name in SITES)
    with open_members(coordinator) as members:
        for name, site in zip(SITES, sites, strict=True):
            request = EnrolRequest(
                site=name,
                public_key=site.identity().public_key.hex(),
                fleet_key=site.fleet_public_key.read_text().strip(),
                secret=members.invite(name, expires=now + 3600, now=now),
            )
            body = request.signed(site.identity(), site.fleet_key.read_bytes())
            members.enrol(EnrolRequest.open(body), now)
        sealed = members.sealed_roster()
    for name, site in zip(SITES, sites, strict=True):
        write_private(site.ca, coordinator.ca.read_bytes())
        write_private(site.roster, sealed)
        write_private(site.policy, _POLICY.encode())
        write_private(site.data / "notes.toml", _SOURCE.encode())
        site.write_config(
            SiteConfig(
                name=name,
                address=config.address,
                coordinator=coordinator.identity().public_key.hex(),
            )
        )
    return Ground(coordinator=coordinator, sites=sites)


def plan(rounds: int) -> Plan:
    """So many rounds of full secure aggregation: every site needed, one of them may collude."""
    return Plan(
        name="round",
        model=Model(path="none", sha256=_DIGEST),
        data=Data(unit="patient"),
        rounds=Rounds(
            count=rounds, spare=1, steps=1, sampling_rate=1.0, normaliser=1.0, learning_rate=1.0
        ),
        cohort=Cohort(minimum=len(SITES), colluders=1),
        aggregation=Aggregation(scheme="fedavg", update_clip=1.0),
        privacy=Privacy(epsilon=8.0, delta=1e-5),
    )
