"""The parts of ``dp_utility.py``."""
