"""What the tests of this room share: texts, rows and a plan over a tiny model."""

from pathlib import Path
from typing import Any

from fedward.plan import Data, Model, Plan, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation

LABELS = ("cardiology", "neurology", "surgery")
TEXTS = [
    "The patient reports chest pain after exercise and a fast heart beat.",
    "Headache and blurred vision since Monday; no fever, no cough.",
    "Appendix removed without complications, wound dry, patient walks.",
] * 8
ROWS = [
    {"patient": f"p{i // 2}", "text": text, "label": LABELS[i % 3], "hospital": f"h{i % 4}"}
    for i, text in enumerate(TEXTS)
]


def make_plan(folder: Path | str, **sections: Any) -> Plan:
    """A plan over one model folder; every section can be replaced."""
    given: dict[str, Any] = {
        "model": Model(path=str(folder)),
        "tuner": Tuner(arguments={"r": 4, "lora_alpha": 8}),
        "task": Task(objective="classify", labels=LABELS, max_length=32),
        "data": Data(unit="patient"),
        "rounds": Rounds(count=1, steps=1, sampling_rate=0.5, normaliser=4.0, learning_rate=1e-2),
        "aggregation": Aggregation(scheme="fedavg"),
    }
    return Plan(name="tiny", **(given | sections))
