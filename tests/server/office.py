"""A coordinator's folder with enrolled sites, and the link over it, for tests of the real wire."""

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fedward.client.enrol import pinned_roster
from fedward.client.fleet import Office
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.enrolment import EnrolRequest
from fedward.identity import Roster
from fedward.private_files import write_private
from fedward.server.certificates import issue
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder
from fedward.server.enrolment import enrolment_app
from fedward.server.fleet_api import fleet_app
from fedward.server.front import MAX_BODY, Front, Listener, front_server
from fedward.server.members import open_members


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_coordinator(root: Path, *, port: int | None = None) -> CoordinatorFolder:
    config = CoordinatorConfig(host="127.0.0.1", port=port or free_port(), listen="127.0.0.1")
    folder = CoordinatorFolder.create(root, config)
    issue(folder, datetime.datetime.now(datetime.UTC))
    return folder


def enrol_sites(coordinator: CoordinatorFolder, root: Path, names: list[str]) -> list[SiteFolder]:
    """Folders of sites that are members, each with the roster of all."""
    folders, now = [], int(time.time())
    with open_members(coordinator) as members:
        for name in names:
            folder = SiteFolder.create(root / name, SiteConfig(name=name))
            secret = members.invite(name, expires=now + 3600, now=now)
            request = EnrolRequest(
                site=name,
                public_key=folder.identity().public_key.hex(),
                fleet_key=folder.fleet_public_key.read_text().strip(),
                secret=secret,
            )
            body = request.signed(folder.identity(), folder.fleet_key.read_bytes())
            members.enrol(EnrolRequest.open(body), now)
            folders.append(folder)
        sealed = members.sealed_roster()
    for folder in folders:
        write_private(folder.ca, coordinator.ca.read_bytes())
        write_private(folder.roster, sealed)
        folder.write_config(
            SiteConfig(
                name=folder.config().name,
                address=coordinator.config().address,
                coordinator=coordinator.identity().public_key.hex(),
            )
        )
    return folders


def roster_of(site: SiteFolder) -> Roster:
    return pinned_roster(site)


def office_of(site: SiteFolder) -> Office:
    address = site.config().address
    assert address is not None
    return Office(
        address=address.removeprefix("https://"),
        ca=site.ca,
        key=site.fleet_key,
        note=site.root / "node.json",
    )


def fleet_keys(coordinator: CoordinatorFolder) -> dict[int, str]:
    with open_members(coordinator) as members:
        return {member.id: member.fleet_key for member in members.all() if not member.revoked}


@contextlib.contextmanager
def serving(coordinator: CoordinatorFolder) -> Iterator[None]:
    """The link in a thread of this process."""
    config = coordinator.config()
    listener = Listener(
        host=config.listen,
        port=config.port,
        certificate=coordinator.server_certificate,
        key=coordinator.server_key,
    )
    front = Front(fleet_app(coordinator.fleet_database, MAX_BODY), enrolment_app(coordinator))
    server = front_server(front, listener)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    assert server.started
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
