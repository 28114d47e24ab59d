"""Tests of fedward.client."""
