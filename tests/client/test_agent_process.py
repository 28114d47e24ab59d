"""What the process with a network loads: no torch, and nothing that reads records or models."""

import subprocess
import sys

from tests.client.well import make_site
from tests.simulations import tiny

AGENT = """
import sys, threading
from pathlib import Path
import fedward.cli  # as the command starts
from fedward.attempt import Attempt
from fedward.client.daemon import _agent, run_site
from fedward.client.remote_trainer import site_remote_trainer
from fedward.client.site_folder import SiteFolder
from fedward.client.status import signs_of_life
from fedward.plan import from_json
from fedward.privacy.planned import metric_event, training_event

def loaded():
    heavy = ("torch", "opacus", "transformers", "peft", "datasets", "pyarrow", "pandas")
    print(" ".join(name for name in heavy if name in sys.modules))

folder, plan = SiteFolder.load(Path(sys.argv[1])), from_json(Path(sys.argv[2]).read_bytes())
trainer = site_remote_trainer(folder, child=False)
with _agent(folder, trainer, None) as (agent, journal):
    # What a task makes it do, but for the training, which is the other process's.
    agent._consent.check(plan)
    event, rounds = training_event(plan), plan.rounds.count + plan.rounds.spare
    agent._ledger.open_run("r", plan.hash(), event, rounds, metrics=metric_event(plan))
    agent._ledger.reserve(Attempt(run="r", round=1), journal=journal.head)
done = threading.Event()
done.set()
with signs_of_life(folder):
    run_site(folder, trainer, done)
loaded()
import pyarrow  # the control: quicker than torch
loaded()
"""


def test_the_agent_loads_no_torch_from_its_start_to_a_reservation(base, tmp_path):
    site, plan = make_site(tmp_path, base), tmp_path / "plan.json"
    site.policy.write_text(site.policy.read_text() + "automatic = true\n")
    plan.write_bytes(tiny.make_plan(base).to_json())
    command = [sys.executable, "-I", "-c", AGENT, str(site.root), str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agent, control = done.stdout.splitlines()[-2:]
    assert agent == ""
    assert control == "pyarrow"
