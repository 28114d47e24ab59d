"""Which plans somebody at the site has approved, and whether a plan may be trained at all.

An approval is a file that the site's key has signed. It binds plan, base model, policy and data
source (name, path, unit and columns): after a change of any of them nothing is approved until
somebody says so again.
"""

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedward import typed_toml
from fedward.canonical import canonical_json
from fedward.client.data_sources import load_source
from fedward.client.journal import journal_command
from fedward.client.policy import Policy, load_policy
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, IdentityError, PolicyRefusal
from fedward.identity import open_sealed, verify
from fedward.plan import Plan, from_json, load_plan
from fedward.private_files import remove_durably, write_private

_PURPOSE = "fedward/1/approval"
_PLAN_SIGNATURE = "fedward/1/plan"
_MOST_WAITING = 100


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One plan that may be trained here.

    Args:
        plan: Hex hash of the plan.
        model: Digest of its base model.
        policy: Hex hash of the policy under which it was approved.
        dataset: The data source.
        source: Hex hash of the data source's declaration.
        who: Who approved it, as the operating system says.
        when: ISO 8601 with a zone.
        signer: Key (hex) of the signer that signed the plan; None: nobody but the coordinator.
    """

    plan: str
    model: str
    policy: str
    dataset: str
    source: str
    who: str
    when: str
    signer: str | None = None


class Consent:
    """The site's word on a plan: its policy, the approvals, and the data source for it.

    Args:
        policy: The site's limits, as they were when its process started.
        folder: The site's folder; None in a simulation, where a policy has to be automatic.
    """

    def __init__(self, policy: Policy, folder: SiteFolder | None = None) -> None:
        self.policy, self._folder = policy, folder

    def check(self, plan: Plan, now: datetime | None = None) -> Approval | None:
        """Say yes, or every reason against it.

        A plan that only lacks approval is kept, so that it can be looked at and approved.

        Args:
            plan: The frozen plan.
            now: Local time; the clock's where it is left out.

        Returns:
            The approval; None where the policy is automatic and nobody has approved the plan.

        Raises:
            PolicyRefusal: With every reason at once.
            IdentityError: The approval's file is not what this site has signed.
        """
        reasons = list(self.policy.reasons(plan, now))
        approval, lacking = None, list[str]()
        if self._folder is None:
            if not self.policy.automatic:
                lacking = ["it needs approval, and automatic is off"]
        else:
            approval = find_approval(self._folder, plan, self.policy)
            lacking = list(_lacking(plan, self.policy, approval))
            names = self.policy.datasets if approval is None else (approval.dataset,)
            if len(names) == 1:
                reasons += source_reasons(self._folder, plan, self.policy, names[0])
            reasons += _changed(self._folder, self.policy)
            if self._folder.paused.exists():
                reasons.append("this site is paused: fedward site resume")
            if lacking and not _standing(plan, self.policy, now):
                _keep_waiting(self._folder, plan)
        if reasons or lacking:
            raise PolicyRefusal([*reasons, *lacking])
        return approval


def _standing(plan: Plan, policy: Policy, now: datetime | None) -> list[str]:
    """The reasons against a plan that do not pass with the hour."""
    return list(dataclasses.replace(policy, hours=()).reasons(plan, now))


def _lacking(plan: Plan, policy: Policy, approval: Approval | None) -> list[str]:
    """What only a person at the site can give."""
    found, name = list[str](), plan.hash().hex()[:12]
    if approval is None and not policy.automatic:
        found.append(f"plan {name} waits for approval: fedward site approve {name}")
    if approval is None and len(policy.datasets) != 1:
        found.append(f"no data source is chosen for it: fedward site approve {name} --data NAME")
    if policy.signers and (approval is None or approval.signer not in policy.signers):
        found.append("none of signers has signed it: fedward site approve with --signature")
    return found


def source_reasons(folder: SiteFolder, plan: Plan, policy: Policy, name: str) -> list[str]:
    """Every reason against training a plan on a data source of this name."""
    try:
        return list(policy.source_reasons(plan, load_source(folder, name)))
    except ConfigurationError as error:
        return [str(error)]


def _changed(folder: SiteFolder, policy: Policy) -> list[str]:
    """The file on the disk is the site's word; the process may have read an older one."""
    if load_policy(folder.policy).hash() != policy.hash():
        return [
            "policy.toml has changed since this process read it; the next task finds the new one"
        ]
    return []


def approve(
    folder: SiteFolder,
    plan: Plan,
    *,
    who: str,
    now: datetime,
    dataset: str | None = None,
    signature: bytes | None = None,
) -> Approval:
    """Approve a plan under the site's present policy; in the journal first, durable on return.

    Args:
        folder: The site's.
        plan: The frozen plan; its model digest is filled in.
        who: Who says so.
        now: Local time with a zone.
        dataset: The data source; may be left out where the policy names one.
        signature: By one of the policy's ``signers`` over the plan's hash, 64 bytes.

    Raises:
        PolicyRefusal: The plan exceeds the policy: nobody can approve it before the policy allows
            it. Hours do not matter here.
        ConfigurationError: No policy, or the data source is not one that it names.
        IdentityError: The signature is by none of the signers.
    """
    policy = load_policy(folder.policy)
    name = _dataset(policy, dataset)
    reasons = [*_standing(plan, policy, now), *source_reasons(folder, plan, policy, name)]
    if reasons:
        raise PolicyRefusal(reasons)
    approval = Approval(
        plan=plan.hash().hex(),
        model=str(plan.model.sha256),
        policy=policy.hash().hex(),
        dataset=name,
        source=load_source(folder, name).hash().hex(),
        who=who,
        when=now.isoformat(timespec="seconds"),
        signer=None if signature is None else _signer(plan, policy, signature),
    )
    journal_command(folder, "plan approved", dataclasses.asdict(approval))
    body = canonical_json(dataclasses.asdict(approval))
    write_private(
        folder.approvals / f"{approval.plan}.signed", folder.identity().seal(_PURPOSE, body)
    )
    _waiting_file(folder, approval.plan).unlink(missing_ok=True)
    return approval


def withdraw(folder: SiteFolder, plan: str) -> None:
    """Take an approval back, durably: from the next task on the plan is refused.

    Args:
        folder: The site's.
        plan: Hex hash of the plan, or its first digits.

    Raises:
        ConfigurationError: No such approval, or several.
    """
    paths = [p for p in folder.approvals.glob("*.signed") if p.stem.startswith(plan)]
    if len(paths) != 1:
        raise ConfigurationError(f"{len(paths)} approved plans start with {plan!r}; expected one")
    remove_durably(paths[0])


def find_approval(folder: SiteFolder, plan: Plan, policy: Policy) -> Approval | None:
    """The approval of a plan under a policy; None where there is none that still holds.

    Raises:
        IdentityError: There is a file, but this site's key did not sign it.
    """
    path = folder.approvals / f"{plan.hash().hex()}.signed"
    if not path.exists():
        return None
    try:
        body = open_sealed(folder.identity().public_key, _PURPOSE, path.read_bytes())
        approval = typed_toml.parse_json(Approval, body)
    except (IdentityError, ConfigurationError, OSError) as error:
        raise IdentityError(f"{path}: is not an approval of this site; remove it") from error
    bound = (plan.hash().hex(), plan.model.sha256, policy.hash().hex())
    holds = bound == (approval.plan, approval.model, approval.policy)
    if not holds or approval.dataset not in policy.datasets:
        return None
    try:
        source = load_source(folder, approval.dataset)
    except ConfigurationError:
        return None
    return approval if source.hash().hex() == approval.source else None


def dataset_of(folder: SiteFolder, plan: Plan) -> str:
    """The data source that a plan would be trained on: the approval's, or the policy's only one.

    Raises:
        ConfigurationError: Neither.
    """
    policy = load_policy(folder.policy)
    approval = find_approval(folder, plan, policy)
    return approval.dataset if approval is not None else _dataset(policy, None)


def approved_source(folder: SiteFolder, plan: Plan) -> tuple[str, bytes]:
    """Name and hash of the data source that a plan may be trained on.

    Raises:
        PolicyRefusal: Nobody has approved the plan, or what it was approved for has changed.
        ConfigurationError: There is no such source.
    """
    policy = load_policy(folder.policy)
    approval = find_approval(folder, plan, policy)
    if approval is not None:
        return approval.dataset, bytes.fromhex(approval.source)
    if not policy.automatic:
        raise PolicyRefusal(list(_lacking(plan, policy, None)))
    name = _dataset(policy, None)
    return name, load_source(folder, name).hash()


def waiting_plans(folder: SiteFolder) -> list[Plan]:
    """Plans that were refused only because nobody has approved them, by hash."""
    paths = sorted(folder.approvals.glob("*.waiting.json"))
    return [from_json(path.read_bytes()) for path in paths]


def waiting_plan(folder: SiteFolder, start: str) -> Plan:
    """The waiting plan whose hash starts with these hex digits.

    Raises:
        ConfigurationError: None does, or several.
    """
    found = [plan for plan in waiting_plans(folder) if plan.hash().hex().startswith(start)]
    if not re.fullmatch("[0-9a-f]+", start) or len(found) != 1:
        raise ConfigurationError(
            f"{start}: no such file, and {len(found)} waiting plans have a hash that starts so; "
            "expected one"
        )
    return found[0]


def find_plan(folder: SiteFolder, text: str) -> Plan:
    """A plan from a TOML file, from the JSON of a frozen one, or from those that wait.

    Args:
        folder: The site's.
        text: The file's path, or the first hex digits of a waiting plan's hash.

    Raises:
        ConfigurationError: There is none, or the file is no plan.
    """
    path = Path(text)
    if not path.exists():
        return waiting_plan(folder, text)
    return from_json(path.read_bytes()) if path.suffix == ".json" else load_plan(path)


def plan_signature(plan: Plan) -> tuple[str, bytes]:
    """Purpose and field that a signer signs (:meth:`fedward.identity.Identity.sign`)."""
    return _PLAN_SIGNATURE, plan.hash()


def _signer(plan: Plan, policy: Policy, signature: bytes) -> str:
    for key in policy.signers:
        try:
            verify(bytes.fromhex(key), _PLAN_SIGNATURE, signature, plan.hash())
        except IdentityError:
            continue
        return key
    raise IdentityError("the signature is by none of the policy's signers, or of another plan")


def _dataset(policy: Policy, name: str | None) -> str:
    known = ", ".join(policy.datasets) or "none"
    if name is None:
        if len(policy.datasets) != 1:
            raise ConfigurationError(f"choose a data source with --data; the policy names: {known}")
        return policy.datasets[0]
    if name not in policy.datasets:
        raise ConfigurationError(f"data source {name!r} is not in the policy's datasets: {known}")
    return name


def _waiting_file(folder: SiteFolder, plan: str) -> Path:
    return folder.approvals / f"{plan}.waiting.json"


def _keep_waiting(folder: SiteFolder, plan: Plan) -> None:
    """Keep a plan to look at; not without end, because a coordinator may send any number."""
    path = _waiting_file(folder, plan.hash().hex())
    if not path.exists() and len(list(folder.approvals.glob("*.waiting.json"))) < _MOST_WAITING:
        write_private(path, plan.to_json())
