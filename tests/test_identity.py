"""Signatures, keys on disk and the roster: what holds, and every way in which it must not."""

import stat
from dataclasses import replace

import pytest

from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.errors import IdentityError, InvalidValue
from fedward.identity import (
    Identity,
    Member,
    Roster,
    open_roster,
    open_sealed,
    seal_roster,
    verify,
    verify_raw,
)

# RFC 8032 section 7.1, tests 1 to 3: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701c"
        "f9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0"
        "f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f76098"
        "4dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


def identity(number: int) -> Identity:
    return Identity(bytes([number]) * 32)


def roster() -> Roster:
    members = tuple(
        Member(id=i, name=f"site {i}", public_key=identity(i).public_key) for i in (1, 2, 7)
    )
    return Roster(epoch=3, coordinator=identity(9).public_key, members=members)


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_rfc_8032_vectors(seed, public, message, signature):
    signer, data = Identity(bytes.fromhex(seed)), bytes.fromhex(message)
    assert signer.public_key.hex() == public
    assert signer.sign_raw(data).hex() == signature
    verify_raw(bytes.fromhex(public), bytes.fromhex(signature), data)


def test_a_signature_holds_for_its_purpose_and_fields():
    signer = identity(1)
    verify(signer.public_key, "task", signer.sign("task", b"a", b"b"), b"a", b"b")


@pytest.mark.parametrize(
    ("purpose", "fields"),
    [
        ("hello", (b"a", b"b")),
        ("task", (b"b", b"a")),
        ("task", (b"ab",)),
        ("task", (b"a", b"b", b"")),
        ("task", (b"a", b"B")),
        ("task", ()),
    ],
)
def test_a_signature_holds_for_nothing_else(purpose, fields):
    signer = identity(1)
    with pytest.raises(IdentityError, match="does not verify"):
        verify(signer.public_key, purpose, signer.sign("task", b"a", b"b"), *fields)


@pytest.mark.parametrize("bit", range(0, 64 * 8, 37))
def test_a_signature_with_a_flipped_bit_does_not_verify(bit):
    signer = identity(1)
    signature = bytearray(signer.sign("task", b"a"))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IdentityError):
        verify(signer.public_key, "task", bytes(signature), b"a")


@pytest.mark.parametrize("key", [identity(2).public_key, b"", bytes(31), bytes(33), b"\xff" * 32])
def test_a_signature_does_not_verify_under_another_or_malformed_key(key):
    with pytest.raises(IdentityError):
        verify(key, "task", identity(1).sign("task", b"a"), b"a")


def test_a_sealed_body_opens_for_its_purpose_only():
    signer = identity(1)
    sealed = signer.seal("manifest", b"body")
    assert open_sealed(signer.public_key, "manifest", sealed) == b"body"
    for broken in (sealed + b"x", sealed[:-1], sealed[:63], b"", bytes(64) + b"body"):
        with pytest.raises(IdentityError):
            open_sealed(signer.public_key, "manifest", broken)
    with pytest.raises(IdentityError):
        open_sealed(signer.public_key, "roster", sealed)


def test_new_identities_differ():
    assert Identity().public_key != Identity().public_key


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_seed_has_32_bytes(length):
    with pytest.raises(IdentityError, match=f"32 bytes, not {length}"):
        Identity(bytes(length))


def test_a_saved_key_is_its_owners_alone(tmp_path):
    path = tmp_path / "key"
    identity(1).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).public_key == identity(1).public_key


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "key"
    identity(1).save(path)
    with pytest.raises(FileExistsError):
        identity(2).save(path)
    assert Identity.load_or_create(path).public_key == identity(1).public_key


def test_a_key_is_made_on_first_use_and_kept(tmp_path):
    made = Identity.load_or_create(tmp_path / "key")
    assert Identity.load_or_create(tmp_path / "key").public_key == made.public_key


@pytest.mark.parametrize("content", [None, b"", bytes(31)])
def test_a_key_that_cannot_be_read_names_its_file(tmp_path, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IdentityError, match=str(path)):
        Identity.load(path)


def test_the_roster_hash_is_fixed():
    expected = "00f7b0177edf5d4475f93e8345284cfb4b86715c929907c591341ba3ae73c4dd"
    assert roster().hash().hex() == expected


def test_the_roster_hash_changes_with_each_field():
    first, *others = roster().members
    changed = [
        replace(roster(), epoch=4),
        replace(roster(), coordinator=identity(10).public_key),
        replace(roster(), members=tuple(others)),
        *(
            replace(roster(), members=(replace(first, **change), *others))
            for change in ({"id": 0}, {"name": "site"}, {"public_key": identity(8).public_key})
        ),
    ]
    hashes = {r.hash() for r in changed}
    assert len(hashes) == len(changed)
    assert roster().hash() not in hashes


def test_a_member_is_found_by_id():
    assert roster().member(7).name == "site 7"
    assert roster().key(2) == identity(2).public_key
    with pytest.raises(IdentityError, match=r"site 3 is not in the roster \(epoch 3\)"):
        roster().key(3)


def member(number: int, key: int, name: str | None = None) -> Member:
    return Member(id=number, name=name or f"{number} {key}", public_key=identity(key).public_key)


@pytest.mark.parametrize(
    "change",
    [
        {"members": (member(1, 1), member(1, 2))},
        {"members": (member(2, 2), member(1, 1))},
        {"members": (member(1, 1), member(2, 1))},
        {"members": (member(1, 1), member(2, 9))},
        {"members": (member(1, 1, "north"), member(2, 2, "north"))},
        {"coordinator": bytes(31)},
        {"epoch": -1},
        {"epoch": 2**64},
    ],
    ids=[
        "id twice",
        "order",
        "key twice",
        "coordinator's key",
        "name twice",
        "short key",
        "epoch",
        "epoch",
    ],
)
def test_a_roster_that_does_not_hold_is_refused(change):
    with pytest.raises(IdentityError):
        replace(roster(), **change)


@pytest.mark.parametrize("epoch", [0, 2**64 - 1])
def test_a_roster_at_the_limits_of_its_epoch_is_hashed(epoch):
    assert len(replace(roster(), epoch=epoch).hash()) == 32


@pytest.mark.parametrize("change", [{"id": -1}, {"id": 2**32}, {"public_key": bytes(33)}])
def test_a_member_that_does_not_hold_is_refused(change):
    with pytest.raises(IdentityError):
        replace(member(1, 1), **change)


UNFIT = ["", " a", "a ", "x" * 65, "a\nb", "a\x1b[2J", "north\u202ehtuos", "a\u200bb", "a\ud800"]
"""Names that would move a terminal's cursor, turn its text round, or hide in it."""


@pytest.mark.parametrize("name", UNFIT)
def test_a_name_that_cannot_be_shown_is_no_member_s(name):
    with pytest.raises(IdentityError, match="1 to 64 printable characters") as caught:
        replace(member(1, 1), name=name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["St Mary", "n\u043erth", "../x", "-x"])
def test_a_roster_from_outside_names_sites_as_sites_are_named(name):
    """The second one's o is a Cyrillic letter."""
    coordinator = identity(9)
    given = replace(
        roster(), coordinator=coordinator.public_key, members=(member(1, 1, "St.Mary_2-b"),)
    )
    assert open_roster(seal_roster(given, coordinator), coordinator.public_key) == given
    odd = replace(given, members=(member(1, 1, name),))
    with pytest.raises(IdentityError, match="names a site that cannot be one"):
        open_roster(seal_roster(odd, coordinator), coordinator.public_key)


@pytest.mark.parametrize("name", [7, None, ["a"]])
def test_a_name_that_is_no_text_is_no_roster_s(name):
    coordinator = identity(9)
    member = [1, name, identity(1).public_key.hex()]
    facts: dict[str, Json] = {
        "epoch": 1, "coordinator": coordinator.public_key.hex(), "members": [member]
    }  # fmt: skip
    sealed = coordinator.seal("fedward/1/roster", canonical_json(facts))
    with pytest.raises(IdentityError, match="not a roster"):
        open_roster(sealed, coordinator.public_key)


@pytest.mark.parametrize("run", ["", "x" * 129, "a\nb", "a\u202eb", "a\x1b[31m", 7])
def test_a_run_s_name_can_be_shown(run):
    with pytest.raises(InvalidValue, match="printable characters"):
        Attempt(run=run, round=1)
    assert Attempt(run="Notizen für 2027", round=1).run
