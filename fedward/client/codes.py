"""What of an error may be known where: a code outside, type and place in logs, words at home."""

import traceback

from fedward.errors import (
    BudgetExceeded,
    ConfigurationError,
    DataError,
    FedwardError,
    IdentityError,
    LedgerError,
    LedgerRolledBack,
    ModelError,
    PolicyRefusal,
    ProtocolError,
    SiteCode,
)

LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What libraries below the trainer raise; everything else is a bug and stops the site."""

_CODES: dict[type[Exception], SiteCode] = {
    ConfigurationError: SiteCode.REFUSED_PLAN,
    PolicyRefusal: SiteCode.REFUSED_POLICY,
    BudgetExceeded: SiteCode.REFUSED_BUDGET,
    LedgerRolledBack: SiteCode.REFUSED_LEDGER,
    LedgerError: SiteCode.REFUSED_BUDGET,
    DataError: SiteCode.DATA_UNUSABLE,
    ModelError: SiteCode.TRAINING_FAILED,
    ProtocolError: SiteCode.PROTOCOL_ABORTED,
    IdentityError: SiteCode.PROTOCOL_ABORTED,
}

_REASON_LIMIT = 500


def code_of(error: Exception) -> SiteCode:
    """What the coordinator is told of an error: a code, never its text."""
    if isinstance(error, FedwardError):
        found = (code for kind, code in _CODES.items() if isinstance(error, kind))
        return next(found, SiteCode.INTERNAL)
    return SiteCode.TRAINING_FAILED


def safe_repr(error: BaseException) -> str:
    """An error for logs: its type and where it was raised; never its message, nor a local value.

    Half of all library messages quote the record that they choke on.

    >>> try:
    ...     int("Mrs Smith")
    ... except ValueError as error:
    ...     safe_repr(error).split(" at ")[0]
    'ValueError'
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"{type(error).__name__} at {place}"


def reason_of(error: Exception) -> str:
    """An error for the journal, which may be shown to auditors: own words about configuration.

    Errors from the side of data and model stay type and place there.
    """
    quiet = isinstance(error, DataError | ModelError) or not isinstance(error, FedwardError)
    return safe_repr(error) if quiet else str(error)[:_REASON_LIMIT]
