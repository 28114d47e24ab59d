"""Tests of fedward.aggregation."""
