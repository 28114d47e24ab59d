"""A whole federation on one machine: grid, demo, scenarios, reports."""
