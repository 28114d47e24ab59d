"""What the benchmark of secure aggregation measures beside the house's own code."""
