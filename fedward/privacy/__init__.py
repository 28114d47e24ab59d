"""Differential privacy at a site: clip engine, units, noise, accounting, ledger."""
