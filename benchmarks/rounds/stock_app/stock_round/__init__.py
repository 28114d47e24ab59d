"""A Flower app of the Message API: FedAvg over arrays that nobody trains."""
