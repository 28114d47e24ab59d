"""``python -m fedward``."""

from fedward.cli import main

main()
