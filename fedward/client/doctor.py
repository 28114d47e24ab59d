"""Everything that can keep a site from training, looked at before it does; each with what to do.

The checks are real: the doctor connects, reads every record, hashes the models, verifies the
ledger and tries the sandbox. It changes nothing, and sends the coordinator an empty request.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from fedward.client.data_sources import load_source
from fedward.client.enrol import own_membership, pinned_roster, waiting_roster
from fedward.client.policy import Policy, load_policy
from fedward.client.reach import Finding, reach
from fedward.client.sandbox import offline_environment
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.site_records import look
from fedward.client.status import disk_trouble
from fedward.errors import ConfigurationError, DataError, FedwardError, ModelError
from fedward.privacy.ledger import read_books
from fedward.private_files import check_private
from fedward.tuning.models import fingerprint

_GIB = 2**30
_WARN = 5 * _GIB

_SANDBOX = """
import pathlib, socket, sys
from fedward.client.sandbox import confine
confine(pathlib.Path(sys.argv[1]))
try:
    socket.socket()
except PermissionError:
    sys.exit(0)
sys.exit("a socket could be opened")
"""


def examine(folder: SiteFolder) -> Iterator[Finding]:
    """Look at a site, most basic things first.

    Args:
        folder: The site's.

    Yields:
        One finding a check, or several of one kind (a model, a data source each).
    """
    yield check_folder(folder)
    try:
        config = folder.config()
    except ConfigurationError as error:
        yield Finding.fail("configuration", str(error), f"mend {folder.config_file.name}")
        return
    yield Finding.ok("configuration", f"site {config.name!r}")
    yield check_roster(folder)
    if config.address is None:
        yield Finding.fail("coordinator", "none is known", "fedward site enrol TOKEN")
    else:
        yield from reach(config.address, folder.ca)
    yield check_disk(folder)
    yield check_sandbox(folder)
    try:
        policy = load_policy(folder.policy)
    except ConfigurationError as error:
        yield Finding.fail("policy", str(error), "without a policy nothing is trained; write one")
        yield check_device(config, None)
        return
    yield check_policy(policy)
    yield check_device(config, policy)
    yield from check_models(folder, policy)
    yield from check_datasets(folder, policy)
    yield check_ledger(folder, policy)


def check_folder(folder: SiteFolder) -> Finding:
    """Nobody else on this machine may open the folder or the keys."""
    try:
        for path in (folder.root, folder.key, folder.fleet_key, folder.sockets):
            check_private(path)
    except ConfigurationError as error:
        return Finding.fail("folder", str(error), "only the site's account may read its folder")
    return Finding.ok("folder", f"{folder.root} is its owner's only")


def check_roster(folder: SiteFolder) -> Finding:
    """The pinned roster must hold, and name this site with its key."""
    try:
        roster = pinned_roster(folder)
        member = own_membership(folder, roster)
        waiting = waiting_roster(folder)
    except FedwardError as error:
        return Finding.fail(
            "roster", str(error), "ask the coordinator for a token, then site enrol"
        )
    says = f"epoch {roster.epoch}, {len(roster.members)} sites, this one is number {member.id}"
    if waiting is not None:
        return Finding.warn(
            "roster",
            f"{says}; epoch {waiting.epoch} waits",
            "compare it, then fedward site roster --approve",
        )
    return Finding.ok("roster", says)


def check_disk(folder: SiteFolder) -> Finding:
    """Ledger and journal must be able to grow: what they cannot record is not trained."""
    trouble = disk_trouble(folder)
    if trouble:
        return Finding.fail("disk", trouble, "make room, or mount it writable; mend its owner")
    free = shutil.disk_usage(folder.root).free
    says = f"{free / _GIB:.1f} GiB free at {folder.root}"
    if free < _WARN:
        return Finding.warn("disk", says, "make room soon")
    return Finding.ok("disk", says)


def check_sandbox(folder: SiteFolder) -> Finding:
    """Confine a process for a moment and let it try to open a socket."""
    with TemporaryDirectory(dir=folder.cache if folder.cache.is_dir() else None) as cache:
        done = subprocess.run(  # noqa: S603  # a fixed program
            [sys.executable, "-I", "-c", _SANDBOX, cache],
            env=offline_environment(Path(cache)),
            capture_output=True,
            timeout=60,
            check=False,
        )
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return Finding.fail(
            "sandbox",
            words or f"it ended with {done.returncode}",
            "the trainer needs Linux with seccomp; a container may forbid it",
        )
    return Finding.ok("sandbox", "a confined process could open no socket")


def check_policy(policy: Policy) -> Finding:
    """A policy that allows nothing, or everything, is worth a word."""
    until = policy.permit_until
    if until is not None and until < f"{datetime.now().astimezone():%Y-%m-%d}":
        return Finding.fail(
            "policy", f"the permit ended on {until}", "renew it, and permit_until with it"
        )
    if not policy.models or not policy.datasets:
        return Finding.fail(
            "policy",
            "it names no models or no datasets, so that it refuses every plan",
            "fedward site model add and data add say what to write there",
        )
    says = f"epsilon {policy.max_epsilon:g} at delta {policy.delta:g}, cohort of {policy.minimum}"
    if policy.max_epsilon > 20:
        return Finding.warn(
            "policy", f"{says}: an epsilon above 20 protects little", "lower max_epsilon"
        )
    if policy.automatic:
        return Finding.warn("policy", f"{says}; plans need no approval", "set automatic = false")
    return Finding.ok("policy", says)


def check_device(config: SiteConfig, policy: Policy | None) -> Finding:
    """The device must be there, with the memory that the policy lends."""
    import torch  # heavy, and only this check needs it

    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        return Finding.fail(
            "gpu",
            f"{config.device!r} cannot be used ({type(error).__name__})",
            "see nvidia-smi; install torch for this driver; or train on the cpu",
        )
    if not config.device.startswith("cuda"):
        return Finding.ok("gpu", f"none is used: device = {config.device!r}")
    free, total = torch.cuda.mem_get_info(config.device)
    says = f"{torch.cuda.get_device_name(config.device)}, {free / _GIB:.0f} GiB free"
    lent = policy.gpu_memory if policy is not None else None
    if free < (min(total, lent * _GIB) if lent is not None else total / 2):
        return Finding.warn(
            "gpu", f"{says} of {total / _GIB:.0f}", "see who else uses it: nvidia-smi"
        )
    return Finding.ok("gpu", says)


def check_models(folder: SiteFolder, policy: Policy) -> Iterator[Finding]:
    """Each allowed base model must be here, bit for bit."""
    for digest in policy.models:
        path = folder.models / digest
        name = f"model {digest[:12]}"
        try:
            found = fingerprint(path)
        except ModelError as error:
            yield Finding.fail(name, str(error), "fedward site model add FOLDER")
            continue
        if found == digest:
            yield Finding.ok(name, f"{path.resolve()}")
        else:
            yield Finding.fail(
                name,
                f"its files have the digest {found[:12]}",
                "they were changed: copy the model again, then site model add",
            )


def check_datasets(folder: SiteFolder, policy: Policy) -> Iterator[Finding]:
    """Each data source must be readable, with the columns that it names."""
    for dataset in policy.datasets:
        name = f"data {dataset}"
        try:
            facts = look(load_source(folder, dataset))
        except (DataError, ConfigurationError) as error:
            yield Finding.fail(name, str(error), "mend the file, or fedward site data add again")
            continue
        says = f"{facts.rows} rows"
        if facts.units is None:
            judge = Finding.warn if "record" in policy.units else Finding.fail
            yield judge(
                name,
                f"{says}, each protected by itself, not each patient",
                "fedward site data add with --unit COLUMN, or units in policy.toml",
            )
        elif facts.unreadable:
            yield Finding.warn(
                name,
                f"{says}, and {facts.unreadable} that cannot be read",
                "they are left out: a line that is no JSON, or has more or fewer fields; mend them",
            )
        elif facts.without_unit:
            yield Finding.warn(
                name,
                f"{says} of {facts.units} patients, {facts.without_unit} of nobody",
                "rows without a patient are left out; mend them",
            )
        else:
            yield Finding.ok(name, f"{says} of {facts.units} patients")


def check_ledger(folder: SiteFolder, policy: Policy) -> Finding:
    """Every line of the ledger must hold; without one nothing was spent yet."""
    if not folder.ledger.exists():
        if folder.memory.exists():
            return Finding.fail(
                "ledger",
                "it is missing, but this site has taken part in sessions",
                "restore the ledger: without it the spent privacy is unknown",
            )
        return Finding.ok("ledger", "none yet: nothing was spent")
    try:
        books = read_books(
            folder.ledger,
            folder.identity().public_key,
            epsilon=policy.max_epsilon,
            delta=policy.delta,
        )
    except FedwardError as error:
        return Finding.fail("ledger", str(error), "restore its newest copy; never mend it by hand")
    spent = books.epsilon_spent()
    says = f"epsilon {spent:.3f} of {policy.max_epsilon:g} is spent"
    if spent > 0.8 * policy.max_epsilon:
        return Finding.warn("ledger", says, "little is left for these patients, whatever the plan")
    return Finding.ok("ledger", says)
