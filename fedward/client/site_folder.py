"""The folder of one site: where its keys, policy, ledger and everything else of it lie."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fedward import typed_toml
from fedward.errors import ConfigurationError, InvalidValue
from fedward.identity import Identity
from fedward.private_files import check_private, hold, make_private_folder, write_private

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """``site.toml``: what the site is called and how its daemon runs.

    Args:
        name: The site's name in the roster: 1 to 64 of letters, digits, ``.``, ``_`` and ``-``.
        address: ``https://HOST:PORT`` of the coordinator; ``site enrol`` fills it in.
        coordinator: The coordinator's Ed25519 key, hex; ``site enrol`` fills it in.
        device: The torch device that trains, for example ``cpu`` or ``cuda``.
        physical_batch: Most examples in memory at once, 1 to 4096; does not change the result.
        held_out: Share of the patients kept apart for the site's own evaluation, 0 to 0.5.
        status_port: Port on loopback for health and metrics; 0 for none.
    """

    name: str
    address: str | None = None
    coordinator: str | None = None
    device: str = "cpu"
    physical_batch: int = 64
    held_out: float = 0.1
    status_port: int = 0

    def __post_init__(self) -> None:
        """Check every limit."""
        check_site_name(self.name)
        if self.address is not None and not self.address.startswith("https://"):
            raise InvalidValue("address", self.address, "https://HOST:PORT")
        if self.coordinator is not None and not re.fullmatch("[0-9a-f]{64}", self.coordinator):
            raise InvalidValue("coordinator", self.coordinator, "64 lower-case hex digits")
        if not 1 <= self.physical_batch <= 4096:
            raise InvalidValue("physical_batch", self.physical_batch, "1 to 4096")
        if not 0 <= self.held_out <= 0.5:
            raise InvalidValue("held_out", self.held_out, "0 to 0.5")
        if not 0 <= self.status_port < 2**16:
            raise InvalidValue("status_port", self.status_port, "0 to 65535")


def check_site_name(name: str) -> None:
    """Refuse a name that cannot stand in files, rosters and on a telephone.

    Raises:
        InvalidValue: Not 1 to 64 of letters, digits, ``.``, ``_`` and ``-``.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidValue("name", name, "1 to 64 letters, digits, '.', '_' or '-'")


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """Paths of one site, all below ``root`` (mode 0700; files 0600).

    Args:
        root: The folder.
    """

    root: Path

    @property
    def config_file(self) -> Path:
        """``site.toml``, a :class:`SiteConfig`."""
        return self.root / "site.toml"

    @property
    def key(self) -> Path:
        """The Ed25519 seed that signs letters, ledger, journal and approvals."""
        return self.root / "key"

    @property
    def fleet_key(self) -> Path:
        """The EC P-384 key (OpenSSH) that Flower's node authentication asks for."""
        return self.root / "fleet_key"

    @property
    def fleet_public_key(self) -> Path:
        """The public half of :attr:`fleet_key`, OpenSSH text."""
        return self.root / "fleet_key.pub"

    @property
    def ca(self) -> Path:
        """The coordinator's CA certificate (PEM), the only one that its TLS is trusted by."""
        return self.root / "ca.pem"

    @property
    def roster(self) -> Path:
        """The pinned roster, sealed by the coordinator."""
        return self.root / "roster"

    @property
    def pending_roster(self) -> Path:
        """A newer roster that waits for this site's approval; absent where none waits."""
        return self.root / "roster.pending"

    @property
    def policy(self) -> Path:
        """``policy.toml``: the site's own limits. Without it nothing is trained."""
        return self.root / "policy.toml"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.root / "ledger.jsonl"

    @property
    def memory(self) -> Path:
        """What the site must remember about sessions."""
        return self.root / "memory.jsonl"

    @property
    def journal(self) -> Path:
        """The daemon's journal."""
        return self.root / "journal.jsonl"

    @property
    def command_journal(self) -> Path:
        """The journal of what people did with commands; the daemon holds the other."""
        return self.root / "journal-commands.jsonl"

    @property
    def approvals(self) -> Path:
        """Folder of approved plans, one signed file each."""
        return self.root / "approvals"

    @property
    def data(self) -> Path:
        """Folder of data sources: ``NAME.toml`` says where the records lie and how to read them."""
        return self.root / "data"

    @property
    def models(self) -> Path:
        """Folder of base models: each is a folder, or a link to one, named by its SHA-256."""
        return self.root / "models"

    @property
    def paused(self) -> Path:
        """While this file is there, the site takes no new round."""
        return self.root / "paused"

    @property
    def node(self) -> Path:
        """What Flower called this site's process, to say good-bye to after a kill."""
        return self.root / "node.json"

    @property
    def personal(self) -> Path:
        """What of trained adapters stays at this site."""
        return self.root / "personal"

    @property
    def cache(self) -> Path:
        """Temporary files of the trainer."""
        return self.root / "cache"

    @property
    def sockets(self) -> Path:
        """Folder of the Unix sockets."""
        return self.root / "sockets"

    @property
    def trainer_socket(self) -> Path:
        """The trainer's Unix socket."""
        return self.sockets / "trainer.sock"

    @property
    def control_socket(self) -> Path:
        """The agent's Unix socket for local control."""
        return self.sockets / "control.sock"

    @classmethod
    def create(cls, root: Path, config: SiteConfig) -> "SiteFolder":
        """Make the folder, its keys and its configuration; again with the same name, nothing.

        Raises:
            ConfigurationError: The folder belongs to a site of another name.
        """
        folder = cls(root=root)
        if folder.config_file.exists():
            found = folder.config()
            if found.name != config.name:
                raise ConfigurationError(
                    f"{root}: is the folder of site {found.name!r}; take another for "
                    f"{config.name!r}"
                )
            return cls.load(root)
        subfolders = (folder.approvals, folder.data, folder.models, folder.cache, folder.sockets)
        for path in (root, *subfolders):
            make_private_folder(path)
        check_private(root)
        Identity.load_or_create(folder.key)
        if not folder.fleet_public_key.exists():
            _make_fleet_key(folder)
        folder.write_config(config)  # last: with it the folder is whole
        return folder

    @classmethod
    def load(cls, root: Path) -> "SiteFolder":
        """Find a folder that :meth:`create` made.

        Raises:
            ConfigurationError: It is none, or others on this machine can open it.
        """
        folder = cls(root=root)
        if not folder.config_file.exists():
            raise ConfigurationError(
                f"{root}: not the folder of a site; make one with fedward site init"
            )
        check_private(root)
        return folder

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder: two agents with one key would disturb each other's sessions.

        Raises:
            ConfigurationError: Another process holds it.
        """
        with hold(self.root / "run.lock", f"{self.root}: another process runs this site"):
            yield

    def config(self) -> SiteConfig:
        """Read the configuration.

        Raises:
            ConfigurationError: It is missing or invalid.
        """
        return typed_toml.load(SiteConfig, self.config_file)

    def write_config(self, config: SiteConfig) -> None:
        """Replace the configuration."""
        write_private(self.config_file, typed_toml.dump(config).encode())

    def identity(self) -> Identity:
        """The site's key.

        Raises:
            IdentityError: It cannot be read.
        """
        return Identity.load(self.key)


def _make_fleet_key(folder: SiteFolder) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_private(folder.fleet_key, private)
    write_private(folder.fleet_public_key, public + b"\n")
