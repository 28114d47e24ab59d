"""Whole rounds over a real network on this machine: Fedward's and stock Flower's."""
