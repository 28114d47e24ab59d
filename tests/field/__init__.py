"""The federation as separate processes over a real network, killed at will."""
