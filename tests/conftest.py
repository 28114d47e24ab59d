"""Nothing in the tests may reach a hub."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import fedward  # noqa: F401  # switches telemetry off before any test imports a library
