"""The ClientApp: a pause and a fixed update in place of a training."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Say that the training begins, sleep, and add a constant to every number."""
    site, config = int(context.node_config["site"]), context.run_config
    number = message.content.config_records["config"]["server-round"]
    (Path(str(config["out"])) / "marks" / f"{site}-{number!r}").touch()
    time.sleep(float(config["seconds"]))
    trained = [
        array + np.float32(1e-4 * (site + 1))
        for array in message.content.array_records["arrays"].to_numpy_ndarrays()
    ]
    metrics = MetricRecord({"num-examples": 1, "site": site})
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics})
    return Message(content, reply_to=message)
