"""docs/walk-central.md works: its commands are read from the page and typed into one shell."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedward.server.central.loading import open_trained
from fedward.server.registry import Registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "walk-central.md"
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def accuracy(document: Any) -> float:
    """The preference accuracy of ``fedward evaluate --json``."""
    return float(document["figures"]["preference_accuracy"]["value"])


@pytest.mark.slow
def test_the_commands_of_the_page_end_in_a_model_that_plain_transformers_loads(tmp_path):
    assert len(COMMANDS) >= 7
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = "set -euo pipefail\n" + "".join(COMMANDS)
    script = re.sub(r"^(fedward evaluate) (\S+)", r"\1 \2 --json", script, flags=re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    walk = tmp_path / "out" / "walk"
    registry = Registry.there(walk / "registry")
    last = registry.verify("walk-preferred:1")
    assert [one.title for one in registry.lineage(last)] == ["walk:1", "walk-base:1"]
    federated = registry.get("walk:1")
    assert federated.spent is not None
    assert (federated.spent.epsilon, federated.spent.sites, federated.spent.unit) == (
        8.0,
        4,
        "patient",
    )
    said = json.JSONDecoder()
    found = [
        said.raw_decode(done.stdout, match.start())[0]
        for match in re.finditer(r"^\{$", done.stdout, re.MULTILINE)
    ]
    before, after = map(accuracy, found)
    assert before == after, "the exported model answers as the registered one"
    assert after > 0.9
    assert "walk:1: differential privacy for each `patient`" in done.stdout
    plain = AutoModelForCausalLM.from_pretrained(walk / "model")
    tokens = AutoTokenizer.from_pretrained(walk / "model")(
        "chest pain Service:", return_tensors="pt"
    )
    tuned, _, _ = open_trained(registry.path("walk-preferred"))
    given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert (plain(**given).logits - tuned.eval()(**given).logits).abs().max() < 1e-4
    rows = (walk / "answers.jsonl").read_text().splitlines()
    assert len(rows) == 200
    assert (walk / "model" / "README.md").read_text().startswith("# walk-preferred:1\n")
