"""A Flower app of the Message API: FedAvg, and a note of whose work every round has."""
