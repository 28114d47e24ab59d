"""Tests of fedward.server."""
