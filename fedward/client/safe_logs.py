"""What a site's processes write to logs and terminals: no message of a library, and no local value.

Half of all library messages quote the record that they choke on, and a traceback repeats the
message. The site's own words never quote a record (they name file, column and row), so they stay.
"""

import logging
import sys
import threading
import traceback
from types import TracebackType

from fedward.client.codes import safe_repr

_OWN = "fedward"


class SafeFilter(logging.Filter):
    """Lets the site's own words pass, and of anybody else's only where they were said."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record in place; it is always written."""
        error = record.exc_info[1] if record.exc_info else None
        if record.name.split(".")[0] != _OWN:
            record.msg = f"a message of {record.name} at {record.pathname}:{record.lineno}"
            record.args = ()
        if error is not None:
            record.msg, record.args = f"{record.getMessage()} ({safe_repr(error)})", ()
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def keep_records_out_of_logs() -> None:
    """Make this process safe: handlers, warnings, and errors that nobody catches.

    Call it once, after logging is set up. A handler that is added later is not covered.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(SafeFilter())
    logging.captureWarnings(True)
    logging.raiseExceptions = (
        False  # else a message that does not format is printed with its values
    )
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda seen: _uncaught(seen.exc_type, seen.exc_value, seen.exc_traceback)
    threading.excepthook = lambda seen: _uncaught(seen.exc_type, seen.exc_value, seen.exc_traceback)


def _uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Say where a bug is, in the words of the code alone."""
    frames = "".join(traceback.format_tb(trace))
    sys.stderr.write(f"{frames}{kind.__name__} (its message may quote a record and is not shown)\n")
