"""Every error Fedward raises, as one tree.

::

    FedwardError
    ├── ConfigurationError        a file or option that the user can mend
    │   └── InvalidValue          one value: key, what came, what is allowed
    ├── DataError                 records that cannot be used (missing column, empty site)
    ├── ModelError                a model or tuner that cannot be loaded or trained
    ├── Unreachable               the other side does not answer, or is not whom its CA vouches for
    ├── IdentityError             a signature, key or roster that does not hold
    ├── ProtocolError             a secure-aggregation check failed: the session ends here
    ├── PrivacyError              the privacy guarantee could not be kept
    │   ├── BudgetExceeded        the ledger refuses further spending
    │   ├── LedgerError           the ledger's chain is broken or cannot be written
    │   │   └── LedgerRolledBack  lines are missing that were once acknowledged
    │   └── UncoveredParameters   trainable parameters whose gradients nobody clips
    ├── PolicyRefusal             the site's policy says no, with every reason
    └── RoundError                a round or a run cannot go on
        └── CohortTooSmall        fewer sites than the minimum

Messages say what was expected, what came and what to do next. They may quote configuration, never a
record: only a :class:`SiteCode` leaves a site (DESIGN §5.9).
"""

from collections.abc import Sequence
from enum import StrEnum


class FedwardError(Exception):
    """Base of every error that Fedward raises on purpose."""


class ConfigurationError(FedwardError):
    """A plan, policy, job or option is wrong; the message says where and what is allowed."""


class InvalidValue(ConfigurationError):
    """One configuration value is out of range.

    Args:
        key: The key as written in the file, e.g. ``sampling_rate``.
        value: What was given.
        allowed: What is allowed, in words.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key} = {value!r}: expected {allowed}")
        self.key, self.value, self.allowed = key, value, allowed


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise unless the value of a key is allowed (NaN never is: no comparison holds for it).

    Raises:
        InvalidValue: With the last three arguments.
    """
    if not holds:
        raise InvalidValue(key, value, allowed)


class DataError(FedwardError):
    """Records are missing, empty or lack a column."""


class ModelError(FedwardError):
    """A model, tokenizer or tuner cannot be loaded, or training it failed."""


class Unreachable(FedwardError):
    """The other side cannot be reached, does not answer, or its TLS certificate does not hold."""


class IdentityError(FedwardError):
    """A signature, key or roster does not hold."""


class ProtocolError(FedwardError):
    """A secure-aggregation check failed; the session ends and nothing more is sent."""


class PrivacyError(FedwardError):
    """The privacy guarantee could not be kept, so nothing was released."""


class BudgetExceeded(PrivacyError):
    """The ledger refuses: spent plus reserved would pass the cap."""


class LedgerError(PrivacyError):
    """The ledger's chain is broken or cannot be written."""


class LedgerRolledBack(LedgerError):
    """The ledger is older than what somebody outside has seen of it, or it is another one."""


class UncoveredParameters(PrivacyError):
    """Trainable parameters whose per-unit gradients the engine cannot bound."""


class PolicyRefusal(FedwardError):
    """The site's policy refuses a plan.

    Args:
        reasons: Every reason at once, each a sentence.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("the site's policy refuses this plan:\n  " + "\n  ".join(reasons))
        self.reasons = tuple(reasons)


class RoundError(FedwardError):
    """A round or a run cannot go on."""


class CohortTooSmall(RoundError):
    """Fewer sites are ready than plan and policies ask for."""


class SiteCode(StrEnum):
    """All that a site ever says about its state: a closed list without text or counts."""

    READY = "ready"
    DONE = "done"
    REFUSED_SIGNATURE = "refused-signature"
    REFUSED_STALE = "refused-stale"
    REFUSED_PLAN = "refused-plan"
    REFUSED_POLICY = "refused-policy"
    REFUSED_BUDGET = "refused-budget"
    REFUSED_LEDGER = "refused-ledger"
    DATA_UNUSABLE = "data-unusable"
    TRAINING_FAILED = "training-failed"
    PROTOCOL_ABORTED = "protocol-aborted"
    INTERNAL = "internal"
