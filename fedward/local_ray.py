"""A Ray of its own on this machine: loopback only, no dashboard, no cluster that runs already."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from fedward.errors import ConfigurationError

_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextlib.contextmanager
def local_ray(workers: int, needed_by: str) -> Iterator[Any]:
    """Start Ray until the context ends.

    Args:
        workers: Processes at a time, each with one thread; 1 or more.
        needed_by: The option that asks for it, for the message where Ray is missing.

    Yields:
        The module ``ray``; imported here because it is an extra.

    Raises:
        ConfigurationError: Ray is not installed or does not start.
    """
    # Despite its name it is what makes Ray listen on loopback alone, if it is there at the import.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            f"{needed_by} needs Ray: pip install 'fedward[ray]', or leave {needed_by} out"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
            ray.init(
                address="local",
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _THREADS},
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(f"Ray does not start: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
