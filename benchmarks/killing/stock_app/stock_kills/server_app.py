"""The ServerApp: FedAvg with its own defaults for how many nodes a round needs."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for all sites, run the rounds, and say that they are over."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["sites"]):
        time.sleep(0.1)
    out = Path(str(config["out"]))

    def note(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        """Whose work is in this round."""
        sites = sorted(int(str(one.metric_records["metrics"]["site"])) for one in contents)
        with (out / "counted").open("a") as file:
            file.write(f"{json.dumps(sites)}\n")
        return MetricRecord({"sites": len(sites)})

    start = np.random.default_rng(0)
    arrays = [
        start.standard_normal(int(config["numbers"]), dtype=np.float32)
        for _ in range(int(config["tensors"]))
    ]
    strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=note)
    strategy.start(grid, ArrayRecord(arrays), num_rounds=int(config["rounds"]))
    (out / "finished").touch()
