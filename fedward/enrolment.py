"""What site and coordinator say to each other about membership: token and requests.

The token reaches the site by a way that both trust (mail to a known address, a courier). It carries
the CA that the site's TLS pins and the coordinator's key, so that nobody in between can pose as the
coordinator, and a secret that admits one site once.
"""

import base64
import dataclasses
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedward import typed_toml
from fedward.canonical import canonical_json, digest
from fedward.errors import ConfigurationError, IdentityError
from fedward.identity import Identity, verify

ENROL_PATH = "/v1/enrolment/enrol"
ROSTER_PATH = "/v1/enrolment/roster"
LEAVE_PATH = "/v1/enrolment/leave"
"""Where the coordinator's public port takes the three requests (POST, JSON)."""

CLOCK_SECONDS = 300
"""How far the clocks of a site and the coordinator may be apart."""

_ENROL = "fedward/1/enrol"
_MEMBER = "fedward/1/member-request"
_CHECK_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Token:
    """What the coordinator gives to one site.

    Args:
        site: The name that the site will have.
        address: ``https://HOST:PORT``.
        ca: The CA certificate, PEM.
        coordinator: The coordinator's Ed25519 key, hex.
        secret: 32 bytes, hex; the coordinator keeps only :func:`secret_hash`.
        expires: Unix seconds.
    """

    site: str
    address: str
    ca: str
    coordinator: str
    secret: str
    expires: int

    def encode(self) -> str:
        """One word of letters, digits, ``-`` and ``_``."""
        body = canonical_json(dataclasses.asdict(self))
        return "fedward-" + base64.urlsafe_b64encode(_check(body) + body).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Token":
        """Read what :meth:`encode` wrote.

        Raises:
            ConfigurationError: It is no token, or a character is missing or wrong.
        """
        prefix, _, word = "".join(text.split()).partition("-")
        try:
            data = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        except ValueError:
            data = b""
        body = data[_CHECK_BYTES:]
        if prefix != "fedward" or data[:_CHECK_BYTES] != _check(body):
            raise ConfigurationError(
                "not an enrolment token, or part of it is missing: copy the whole word that "
                "fedward coordinator invite printed"
            )
        return typed_toml.parse_json(cls, body)


def _check(body: bytes) -> bytes:
    """Tells a slip of the hand; protects from nobody."""
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


def secret_hash(secret: str) -> bytes:
    """What the coordinator stores of a token's secret (32 random bytes need no salt)."""
    return digest("enrolment secret", secret.encode())


@dataclass(frozen=True, kw_only=True)
class EnrolRequest:
    """A site asks to become a member with two keys that it made itself.

    Args:
        site: Its name, as in the token.
        public_key: Its Ed25519 key, hex.
        fleet_key: Its EC P-384 key, OpenSSH text.
        secret: The token's.
        signature: By ``public_key`` over all of the above, hex.
        fleet_signature: By ``fleet_key`` over the same (ECDSA, SHA-384), hex.
    """

    site: str
    public_key: str
    fleet_key: str
    secret: str
    signature: str = ""
    fleet_signature: str = ""

    def signed(self, identity: Identity, fleet_key: bytes) -> bytes:
        """The request as it is posted, signed with both keys.

        Args:
            identity: The site's.
            fleet_key: The private key, OpenSSH PEM.
        """
        key = load_ssh_private_key(fleet_key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError("the fleet key must be an EC P-384 key")
        request = dataclasses.replace(
            self,
            signature=identity.sign(_ENROL, self._body()).hex(),
            fleet_signature=key.sign(digest(_ENROL, self._body()), ec.ECDSA(SHA384())).hex(),
        )
        return canonical_json(dataclasses.asdict(request))

    @classmethod
    def open(cls, data: bytes) -> "EnrolRequest":
        """Read a request and check both signatures.

        Raises:
            IdentityError: Malformed, or a signature does not hold.
        """
        try:
            request = typed_toml.parse_json(cls, data)
            key, signature = bytes.fromhex(request.public_key), bytes.fromhex(request.signature)
            verify(key, _ENROL, signature, request._body())
            fleet_key = load_ssh_public_key(request.fleet_key.encode())
            if not isinstance(fleet_key, ec.EllipticCurvePublicKey) or not isinstance(
                fleet_key.curve, ec.SECP384R1
            ):
                raise IdentityError("the fleet key must be an EC P-384 key")
            fleet_key.verify(
                bytes.fromhex(request.fleet_signature),
                digest(_ENROL, request._body()),
                ec.ECDSA(SHA384()),
            )
        except (ConfigurationError, ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise IdentityError("the request is malformed, or a key did not sign it") from error
        return request

    def _body(self) -> bytes:
        return canonical_json([self.site, self.public_key, self.fleet_key, self.secret])


@dataclass(frozen=True, kw_only=True)
class MemberRequest:
    """A member asks for what its key alone entitles it to: the current roster, or to leave.

    Args:
        public_key: Its Ed25519 key, hex.
        time: Unix seconds by its clock.
        signature: Over path, coordinator and time, hex.
    """

    public_key: str
    time: int
    signature: str = ""

    @classmethod
    def signed(cls, identity: Identity, now: int, *, path: str, coordinator: bytes) -> bytes:
        """The request as it is posted.

        Args:
            identity: The member's.
            now: Unix seconds.
            path: Where it is posted, which is what it asks for.
            coordinator: The coordinator's Ed25519 key, 32 bytes: no other can use the request.
        """
        signature = identity.sign(_MEMBER, path.encode(), coordinator, str(now).encode())
        request = cls(public_key=identity.public_key.hex(), time=now, signature=signature.hex())
        return canonical_json(dataclasses.asdict(request))

    @classmethod
    def open(cls, data: bytes, now: int, *, path: str, coordinator: bytes) -> bytes:
        """Check a request; returns the public key that signed it.

        Raises:
            IdentityError: Malformed, not signed by its key for this, or of another time.
        """
        try:
            request = typed_toml.parse_json(cls, data)
            key, signature = bytes.fromhex(request.public_key), bytes.fromhex(request.signature)
        except (ConfigurationError, ValueError) as error:
            raise IdentityError("the request is malformed") from error
        verify(key, _MEMBER, signature, path.encode(), coordinator, str(request.time).encode())
        if abs(request.time - now) > CLOCK_SECONDS:
            raise IdentityError(
                f"the request is of another time; clocks differ by more than {CLOCK_SECONDS} s"
            )
        return key
