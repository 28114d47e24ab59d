"""A site is shown as running only while it gives signs of life."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedward.attempt import Attempt
from fedward.client import status as module
from fedward.client.pulse import FRESH_SECONDS, Pulse
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.client.status import life_file, prometheus, signs_of_life, site_status
from fedward.errors import ConfigurationError
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.ledger import Ledger
from fedward.private_files import write_private

POLICY = b"""max_epsilon = 8.0
delta = 1e-5
max_rounds = 10
models = []
"""


@pytest.fixture
def site(tmp_path):
    return SiteFolder.create(tmp_path / "site", SiteConfig(name="north"))


def seen(site: SiteFolder, seconds_later: float = 0.0) -> tuple[str, bool, bool, int]:
    status = site_status(site, time.time() + seconds_later)
    return status.state, status.connected, status.training, status.step


def test_a_site_runs_from_its_first_sign_of_life_to_its_orderly_end(site):
    assert seen(site) == ("stopped", False, False, 0)
    with signs_of_life(site) as pulse:
        assert seen(site) == ("running", False, False, 0)
        pulse.connection("connected")
        assert seen(site) == ("running", True, False, 0)
        pulse.progress(7)
        assert seen(site) == ("running", True, True, 7)
        pulse.connection("disconnected")
        assert seen(site)[1] is False
    assert seen(site) == ("stopped", False, False, 0)


def test_a_killed_site_is_not_shown_as_running(site):
    program = (
        "import os, pathlib, signal; from fedward.client.pulse import Pulse; "
        f"p = Pulse(pathlib.Path({str(life_file(site))!r})); p.connection('connected'); "
        "p.progress(3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode < 0
    assert seen(site) == ("running", True, True, 3), "its last words"
    assert seen(site, FRESH_SECONDS + 1) == ("silent", False, False, 0)


def test_a_training_that_says_nothing_is_not_shown_while_the_agent_lives(site):
    with signs_of_life(site) as pulse:
        pulse.progress(3)
        words = json.loads(life_file(site).read_text())
        words["beat"] += FRESH_SECONDS + 1
        life_file(site).write_text(json.dumps(words))
        assert seen(site, FRESH_SECONDS + 1) == ("running", False, False, 0)


def test_words_that_are_not_an_agents_are_refused(site):
    life_file(site).write_text('{"state": "running"}')
    with pytest.raises(ConfigurationError, match="unknown key"):
        site_status(site)


def test_signs_of_life_are_its_owners_only_and_come_by_themselves(site, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    with signs_of_life(site):
        first = life_file(site).read_text()
        assert life_file(site).stat().st_mode & 0o777 == 0o600
        end = time.monotonic() + 10
        while life_file(site).read_text() == first:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_what_was_spent_comes_from_the_ledger(site):
    write_private(site.policy, POLICY)
    assert site_status(site).max_epsilon == 8.0
    event = SampledGaussian(noise_multiplier=2.0, sampling_rate=0.1, steps=1)
    with_ledger = Ledger.open(site.ledger, site.identity(), epsilon=8.0, delta=1e-5)
    with_ledger.open_run("r", bytes(32), event, 3)
    for number in (1, 2):
        with_ledger.reserve(Attempt(run="r", round=number))
        with_ledger.mark_sent(Attempt(run="r", round=number))
        status = site_status(site)  # while the agent holds the file
        assert status.rounds_sent == number
    assert 0 < status.epsilon_spent < 8
    with_ledger.close()


def test_a_disk_that_takes_no_records_is_named(site, monkeypatch):
    assert site_status(site).disk == ""
    assert "fedward_site_disk_writable 1" in prometheus(site_status(site))
    usage = shutil.disk_usage(site.root)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "5 MiB are free" in site_status(site).disk
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "read-only" in site_status(site).disk
    assert "fedward_site_disk_writable 0" in prometheus(site_status(site))


def test_a_sign_of_life_that_cannot_be_written_stops_nobody(site, caplog):
    pulse, scratch = Pulse(life_file(site), clock=lambda: 1.0), site.root / "life.json.part"
    scratch.mkdir()
    for step in (1, 2):
        pulse.progress(step)
    assert caplog.text.count("no sign of life can be written") == 1
    scratch.rmdir()
    pulse.progress(3)
    assert seen(site)[0] == "silent", "the clock of this pulse stands at 1970"
    assert json.loads(life_file(site).read_text())["step"] == 3


def health(site: SiteFolder) -> int:
    with grpc.insecure_channel(f"unix:{site.control_socket}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return int(answer.status)


def test_the_health_service_serves_once_the_coordinator_answers(site, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    states = health_pb2.HealthCheckResponse
    with signs_of_life(site) as pulse:
        assert site.control_socket.stat().st_mode & 0o777 == 0o600
        assert health(site) == states.NOT_SERVING
        pulse.connection("connected")
        end = time.monotonic() + 10
        while health(site) != states.SERVING:
            assert time.monotonic() < end
    with pytest.raises(grpc.RpcError):
        health(site)


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_probes_and_metrics_on_loopback(site):
    with module._metrics_server(site, 0) as port:
        assert fetch(port, "/healthz") == (503, "stopped\n")
        with signs_of_life(site) as pulse:
            assert fetch(port, "/healthz") == (200, "running\n")
            assert fetch(port, "/readyz")[0] == 503
            pulse.connection("connected")
            assert fetch(port, "/readyz")[0] == 200
            code, text = fetch(port, "/metrics")
        assert code == 200
        assert "fedward_site_connected 1\n" in text
        assert "# TYPE fedward_site_rounds_sent_total counter" in text
        assert "{" not in text, "no labels"
        assert fetch(port, "/etc/passwd")[0] == 404


def test_a_taken_port_is_explained(site):
    with module._metrics_server(site, 0) as port:
        site.write_config(SiteConfig(name="north", status_port=port))
        with pytest.raises(ConfigurationError, match=f"status_port = {port}"), signs_of_life(site):
            pass
    assert seen(site)[0] == "stopped"


def test_a_second_agent_does_not_speak_for_the_first(site):
    with signs_of_life(site) as pulse:
        pulse.connection("connected")
        with pytest.raises(ConfigurationError, match="another process"), signs_of_life(site):
            pass
        assert seen(site) == ("running", True, False, 0)
        assert health(site)


def test_metrics_leave_out_what_is_not_known(site):
    text = prometheus(site_status(site))
    assert "epsilon_cap" not in text
    assert text.endswith("\n")


def test_a_site_whose_life_was_torn_by_a_power_loss_is_silent(site):
    """Seeds 6, 32 and 33 of the fault laboratory: nobody could ask for the status any more."""
    life_file(site).write_bytes(b"")
    assert seen(site) == ("silent", False, False, 0)
