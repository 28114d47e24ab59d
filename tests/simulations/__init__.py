"""Tests of fedward.simulations."""
