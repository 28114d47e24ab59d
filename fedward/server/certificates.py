"""The coordinator's own CA, and the TLS server certificate that it issues.

Sites pin the CA and nothing else, so no public authority can vouch for another server. Flower has
no client certificates: sites prove themselves with their fleet key and their signatures.
"""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedward.errors import IdentityError
from fedward.private_files import write_private
from fedward.server.coordinator_folder import CoordinatorFolder, is_address

_CA_LIFE = datetime.timedelta(days=3650)
_SERVER_LIFE = datetime.timedelta(days=397)  # the most that TLS clients commonly accept
_RENEW_BEFORE = datetime.timedelta(days=30)
_BACKDATED = datetime.timedelta(hours=1)  # sites' clocks may be behind


def issue(folder: CoordinatorFolder, now: datetime.datetime) -> bool:
    """Make the CA if there is none, and the server certificate unless a good one is there.

    A good one names the configured host, comes from this CA, holds already (the clock may have been
    ahead when it was made) and for 30 days more. Only to make one the CA's key has to be there.

    Args:
        folder: The coordinator's.
        now: The time, with a zone.

    Returns:
        Whether a server certificate was issued.

    Raises:
        IdentityError: A key or certificate that is there cannot be read.
    """
    if not folder.ca.exists():
        _make_ca(folder, now)
    try:
        ca = x509.load_pem_x509_certificate(folder.ca.read_bytes())
        if _is_good(folder, ca, now):
            return False
        ca_key = _load_key(folder.ca_key.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise IdentityError(
            f"{folder.root}: a certificate or its key cannot be read ({type(error).__name__}); "
            "restore ca.pem and ca-key.pem, which sites have pinned"
        ) from error
    _make_server(folder, ca, ca_key, now)
    return True


def server_expires(folder: CoordinatorFolder) -> datetime.datetime:
    """When the server certificate ends, in UTC."""
    return x509.load_pem_x509_certificate(
        folder.server_certificate.read_bytes()
    ).not_valid_after_utc


def _make_ca(folder: CoordinatorFolder, now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedward coordinator CA")])
    usage = _key_usage(key_cert_sign=True)
    certificate = (
        _builder(name, name, key.public_key(), now, _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, SHA384())
    )
    write_private(
        folder.ca_key, _pem(key)
    )  # the key first: a certificate promises that it is there
    write_private(folder.ca, certificate.public_bytes(Encoding.PEM))


def _make_server(
    folder: CoordinatorFolder,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
) -> None:
    host, key = folder.config().host, ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedward coordinator")])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _builder(name, ca.subject, key.public_key(), now, _SERVER_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_san(host)]), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, SHA384())
    )
    write_private(folder.server_key, _pem(key))
    write_private(folder.server_certificate, certificate.public_bytes(Encoding.PEM))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _san(host: str) -> x509.GeneralName:
    if is_address(host):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _is_good(folder: CoordinatorFolder, ca: x509.Certificate, now: datetime.datetime) -> bool:
    if not folder.server_certificate.exists():
        return False
    found = x509.load_pem_x509_certificate(folder.server_certificate.read_bytes())
    key = _load_key(folder.server_key.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        found.not_valid_before_utc <= now
        and found.not_valid_after_utc - now > _RENEW_BEFORE
        and list(names) == [_san(folder.config().host)]
        and found.issuer == ca.subject
        and found.public_key() == key.public_key()  # a crash may have come between the two files
    )


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not an elliptic-curve key")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
