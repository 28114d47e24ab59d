"""Tests of fedward.privacy."""
