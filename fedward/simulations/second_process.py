"""A second process that trains comparisons while the federation runs in the first.

It works on one comparison at a time, leaves Ctrl-C to the first process and ends as soon as that
one is gone, however it went.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection

import torch
from transformers.utils.logging import disable_progress_bar

from fedward.errors import FedwardError, ModelError
from fedward.simulations.comparison import Comparison, measure
from fedward.simulations.failure import Failure
from fedward.tuning.metrics import Metrics
from fedward.tuning.records import Records


@contextlib.contextmanager
def second_process(
    test: Records, threads: int
) -> Iterator[Callable[[Comparison, Callable[[int], None]], Metrics]]:
    """Start the process, and kill it when the context ends.

    Args:
        test: The public records that everything is evaluated on.
        threads: Torch threads of the process, 1 or more.

    Yields:
        What trains and evaluates there as :func:`~fedward.simulations.comparison.measure` does
        here, for one caller at a time. It raises the errors that came up there, and
        ``ModelError`` if the process is gone.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, test, threads), daemon=True)
    with _without_interrupts():
        process.start()
    theirs.close()  # the process now holds the only one, so that its end is seen here
    try:
        yield partial(_ask, ours)
    finally:
        process.kill()  # who waits for an answer gets an error
        process.join()


def _ask(
    connection: Connection, comparison: Comparison, on_round: Callable[[int], None]
) -> Metrics:
    try:
        connection.send(comparison)
        while not isinstance(answer := connection.recv(), Metrics | Failure):
            if isinstance(answer, int):
                on_round(answer)
            else:
                name, level, text = answer
                logging.getLogger(name).log(level, "%s", text)
    except (EOFError, OSError) as error:
        raise ModelError(
            f"the process that trains {comparison.name!r} died, perhaps for want of memory: go on "
            "with --resume, or leave the comparisons out with --federated-only"
        ) from error
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let what is started in here ignore Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, test: Records, threads: int) -> None:
    """The second process: comparisons in; rounds done, log messages and metrics out."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(handlers=[_Forward(connection)], force=True)  # opacus brings its own
    disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs; the first process shows all
    torch.set_num_threads(threads)
    while True:
        try:
            answer: Metrics | Failure = measure(connection.recv(), test, connection.send)
        except FedwardError as error:
            answer = Failure(kind=type(error), text=str(error))
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)  # in the middle of a training


class _Forward(logging.Handler):
    """Sends log messages to the first process, which knows what is shown and how."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send logger, level and text."""
        self._connection.send((record.name, record.levelno, record.getMessage()))
