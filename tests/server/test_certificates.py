"""The CA vouches for one server, and for nothing else."""

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from fedward.errors import IdentityError
from fedward.server.certificates import issue, server_expires
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder

NOW = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def made(root: Path, host: str = "fed.example.org") -> CoordinatorFolder:
    folder = CoordinatorFolder.create(root, CoordinatorConfig(host=host))
    issue(folder, NOW)
    return folder


def check(
    folder: CoordinatorFolder,
    host: str,
    *,
    ca: Path | None = None,
    at: datetime.datetime = NOW,
) -> None:
    """A TLS client's check of the server certificate."""
    store = verification.Store([x509.load_pem_x509_certificate((ca or folder.ca).read_bytes())])
    name = x509.DNSName(host)
    leaf = x509.load_pem_x509_certificate(folder.server_certificate.read_bytes())
    verifier = verification.PolicyBuilder().store(store).time(at).build_server_verifier(name)
    verifier.verify(leaf, [])


def test_the_server_certificate_holds_for_its_host_under_its_ca(tmp_path):
    folder = made(tmp_path / "c")
    check(folder, "fed.example.org")
    for host, at in (("other.org", NOW), ("fed.example.org", NOW + 400 * DAY)):
        with pytest.raises(verification.VerificationError):
            check(folder, host, at=at)
    other = made(tmp_path / "d")
    with pytest.raises(verification.VerificationError):
        check(folder, "fed.example.org", ca=other.ca)


def test_keys_are_p384_and_their_owners_only(tmp_path):
    folder = made(tmp_path / "c")
    for path in (folder.ca, folder.server_certificate):
        key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)
    for path in (folder.ca_key, folder.server_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("host", "kind"), [("127.0.0.1", x509.IPAddress), ("::1", x509.IPAddress), ("h", x509.DNSName)]
)
def test_an_address_stands_in_the_certificate_as_one(tmp_path, host, kind):
    folder = made(tmp_path / "c", host)
    leaf = x509.load_pem_x509_certificate(folder.server_certificate.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name) for name in names.get_values_for_type(kind)] == [host]


def test_a_good_certificate_stays_and_an_ending_one_is_renewed_under_the_same_ca(tmp_path):
    folder = made(tmp_path / "c")
    before, ca = folder.server_certificate.read_bytes(), folder.ca.read_bytes()
    assert not issue(folder, NOW + 300 * DAY)
    assert folder.server_certificate.read_bytes() == before
    assert issue(folder, NOW + 370 * DAY)
    assert folder.ca.read_bytes() == ca
    assert server_expires(folder) == NOW + (370 + 397) * DAY
    check(folder, "fed.example.org", at=NOW + 400 * DAY)


def test_a_certificate_of_a_clock_that_was_ahead_is_made_again(tmp_path):
    folder = made(tmp_path / "c")
    assert issue(folder, NOW + 370 * DAY)
    assert issue(folder, NOW), "until next year no site would take it"
    check(folder, "fed.example.org")


def test_the_key_of_the_ca_may_be_elsewhere_until_it_is_needed(tmp_path):
    folder = made(tmp_path / "c")
    folder.ca_key.unlink()
    assert not issue(folder, NOW)
    with pytest.raises(IdentityError, match=r"restore ca\.pem"):
        issue(folder, NOW + 370 * DAY)


def test_a_key_without_its_certificate_after_a_crash_is_made_again(tmp_path):
    folder = made(tmp_path / "c")
    folder.server_key.write_bytes(made(tmp_path / "d").server_key.read_bytes())
    assert issue(folder, NOW)
    check(folder, "fed.example.org")


def test_a_damaged_ca_is_not_replaced_silently(tmp_path):
    folder = made(tmp_path / "c")
    folder.ca_key.write_text("none")
    folder.server_certificate.unlink()
    with pytest.raises(IdentityError, match=r"restore ca\.pem"):
        issue(folder, NOW)
