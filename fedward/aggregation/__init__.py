"""Secure aggregation (both sides), fixed point and aggregation schemes."""
