"""The folder of the coordinator: where its keys, certificates, members and runs lie."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from fedward import typed_toml
from fedward.errors import ConfigurationError, InvalidValue
from fedward.identity import Identity
from fedward.plan import Plan
from fedward.private_files import check_private, make_private_folder, write_private

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """``coordinator.toml``: under which name sites reach the coordinator, and where it listens.

    Args:
        host: DNS name or IP address that sites connect to; the server certificate names it.
        port: The public port, 1 to 65535: enrolment and Flower's Fleet API, nothing else.
        listen: Address that the public port is bound to.
        away: Seconds that a round waits for sites which are away, once all others have answered;
            0 to 3600.
        runs_at_once: Runs that are open side by side, 1 to 16; their rounds take turns. With 1, one
            run follows the other. A site's trainer keeps the models of two runs loaded.
        max_letter: Most MiB of one answer of a site, 1 to 4096: its masked words need the most.
    """

    host: str
    port: int = 9443
    listen: str = "0.0.0.0"  # noqa: S104  # sites come from outside
    away: int = 30
    runs_at_once: int = 2
    max_letter: int = 1024

    def __post_init__(self) -> None:
        """Check every limit."""
        if not (is_address(self.host) or _HOST.fullmatch(self.host)):
            raise InvalidValue("host", self.host, "a lower-case DNS name or an IP address")
        if not is_address(self.listen):
            raise InvalidValue("listen", self.listen, "an IP address")
        if not 1 <= self.port < 2**16:
            raise InvalidValue("port", self.port, "1 to 65535")
        if not 0 <= self.away <= 3600:
            raise InvalidValue("away", self.away, "0 to 3600")
        if not 1 <= self.runs_at_once <= 16:
            raise InvalidValue("runs_at_once", self.runs_at_once, "1 to 16")
        if not 1 <= self.max_letter <= 4096:
            raise InvalidValue("max_letter", self.max_letter, "1 to 4096")

    @property
    def address(self) -> str:
        """``https://HOST:PORT`` as sites use it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"


def is_address(host: str) -> bool:
    """Whether a host is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class CoordinatorFolder:
    """Paths of the coordinator, all below ``root`` (mode 0700; files 0600).

    Args:
        root: The folder.
    """

    root: Path

    @property
    def config_file(self) -> Path:
        """``coordinator.toml``, a :class:`CoordinatorConfig`."""
        return self.root / "coordinator.toml"

    @property
    def key(self) -> Path:
        """The Ed25519 seed that signs letters and the roster."""
        return self.root / "key"

    @property
    def ca_key(self) -> Path:
        """The CA's private key (PEM); needed only to issue server certificates."""
        return self.root / "ca-key.pem"

    @property
    def ca(self) -> Path:
        """The CA certificate (PEM) that sites pin."""
        return self.root / "ca.pem"

    @property
    def server_key(self) -> Path:
        """The TLS server's private key (PEM)."""
        return self.root / "server-key.pem"

    @property
    def server_certificate(self) -> Path:
        """The TLS server's certificate (PEM), issued by the CA."""
        return self.root / "server.pem"

    @property
    def members(self) -> Path:
        """The database of members and invitations, from which the roster follows."""
        return self.root / "members.sqlite"

    @property
    def fleet_database(self) -> Path:
        """The database of Flower's SuperLink."""
        return self.root / "superlink.sqlite"

    @property
    def runs(self) -> Path:
        """Folder of the runs: events, adapters and sums."""
        return self.root / "runs"

    @property
    def plans(self) -> Path:
        """Folder of the frozen plans of started runs."""
        return self.root / "plans"

    def fallback_job(self, plan: Plan) -> Path:
        """The job of a started plan's ``[fallback]``, as it was when the plan was started."""
        return self.plans / f"{plan.hash().hex()}.job.toml"

    def gate_data(self, plan: Plan) -> Path:
        """The records of a started plan's ``[gate]``, as they were when the plan was started.

        Raises:
            ConfigurationError: The plan has no such section.
        """
        if plan.gate is None:
            raise ConfigurationError("the plan has no [gate]")
        return self.plans / f"{plan.hash().hex()}.gate.{Path(plan.gate.data).name}"

    @property
    def registry(self) -> Path:
        """Folder of the registry of models."""
        return self.root / "registry"

    @property
    def flower_home(self) -> Path:
        """Flower's own folder (``FLWR_HOME``)."""
        return self.root / "flower"

    @property
    def sockets(self) -> Path:
        """Folder of the Unix sockets."""
        return self.root / "sockets"

    @property
    def control_socket(self) -> Path:
        """The control service's Unix socket."""
        return self.sockets / "control.sock"

    @classmethod
    def create(cls, root: Path, config: CoordinatorConfig) -> "CoordinatorFolder":
        """Make the folder, its identity and its configuration; again with the same host, nothing.

        Certificates are :func:`fedward.server.certificates.issue`'s.

        Raises:
            ConfigurationError: The folder belongs to a coordinator with another configuration.
        """
        folder = cls(root=root)
        if folder.config_file.exists():
            found = folder.config()
            if (found.host, found.port) != (config.host, config.port):
                raise ConfigurationError(
                    f"{root}: is the folder of the coordinator at {found.address}; sites know it "
                    f"by that address. Take another folder for {config.address}"
                )
            return cls.load(root)
        subfolders = (folder.runs, folder.plans, folder.flower_home, folder.sockets)
        for path in (root, *subfolders):
            make_private_folder(path)
        check_private(root)
        Identity.load_or_create(folder.key)
        write_private(folder.config_file, typed_toml.dump(config).encode())
        return folder

    @classmethod
    def load(cls, root: Path) -> "CoordinatorFolder":
        """Find a folder that :meth:`create` made.

        Raises:
            ConfigurationError: It is none, or others on this machine can open it.
        """
        folder = cls(root=root)
        if not folder.config_file.exists():
            raise ConfigurationError(
                f"{root}: not the folder of a coordinator; make one with fedward coordinator init"
            )
        check_private(root)
        return folder

    def config(self) -> CoordinatorConfig:
        """Read the configuration.

        Raises:
            ConfigurationError: It is missing or invalid.
        """
        return typed_toml.load(CoordinatorConfig, self.config_file)

    def identity(self) -> Identity:
        """The coordinator's key.

        Raises:
            IdentityError: It cannot be read.
        """
        return Identity.load(self.key)
