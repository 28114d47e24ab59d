"""Central training: one job, any stage, any tuner, on data that the coordinator may use."""
