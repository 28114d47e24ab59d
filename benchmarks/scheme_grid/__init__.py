"""The parts of ``federation.py``."""
