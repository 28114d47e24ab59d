"""The ServerApp: stock FedAvg, and a clock that is read after every round."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write when each ended, in seconds of the monotonic clock."""
    config = context.run_config
    sites = int(config["sites"])
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.1)
    times = list[float]()

    def clock(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        times.append(time.monotonic())
        return None

    start = np.random.default_rng(0)
    arrays = [
        start.standard_normal(int(config["numbers"]), dtype=np.float32)
        for _ in range(int(config["tensors"]))
    ]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid, ArrayRecord(arrays), num_rounds=int(config["rounds"]), evaluate_fn=clock)
    out = Path(str(config["out"]))
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(times))
    scratch.replace(out)
