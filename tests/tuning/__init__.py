"""Tests of fedward.tuning."""
