"""The parts of ``first_federation.py``."""
