"""Fedward: hospitals fine-tune one language model together.

Importing the package switches off the telemetry of the libraries below it, before any of them is
imported (DESIGN §5.10), and warnings of bitsandbytes that nobody needs.
"""

import logging
import os

__version__ = "0.1.0"

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of missing kernels, of every int8 cast
