"""Whole jobs: resumed, chained, stopped early, used; and nothing looks up a host."""

import dataclasses
import io
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.plan import Model
from fedward.server.central.checkpoints import latest
from fedward.server.central.job import Data, Reward, Stop
from fedward.server.central.loading import open_trained, starting_folder
from fedward.server.central.manifest import MANIFEST, read_manifest
from fedward.server.central.predicting import predict
from fedward.server.central.running import save_trained
from fedward.server.central.stages import build
from fedward.tuning.models import fingerprint
from tests.server.central.rig import ROWS, build_base, make_step, run, write_rows

QUIET = Console(file=io.StringIO())
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A job that ran: a step, and where its work is."""
    folder = tmp_path_factory.mktemp("done")
    step = make_step(base, folder, "sft", train={"max_steps": 4, "save_steps": 2})
    (report,) = run(step, out=folder / "out")
    return step, folder / "out", report


def copied(done: Any, folder: Path) -> Path:
    """The job's work, to be changed."""
    shutil.copytree(done[1], folder / "out")
    return folder / "out"


class TestResume:
    def test_a_job_leaves_what_the_page_says(self, done):
        step, out, report = done
        names = {path.name for path in (out / step.name).iterdir()}
        assert names == {"model", "checkpoints", "log.jsonl", "report.json", "step.json"}
        assert report["steps"] == 4
        lines = [json.loads(x) for x in (out / "sft" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]

    def test_a_finished_job_is_kept(self, done):
        step, out, report = done
        assert run(step, out=out, resume=True) == [report]

    def test_an_interrupted_job_ends_with_the_same_weights(self, done, tmp_path):
        out = copied(done, tmp_path) / "sft"
        expected = load_file(out / "model" / "adapter_model.safetensors")
        log = (out / "log.jsonl").read_text().splitlines()
        shutil.rmtree(out / "model")
        (out / "report.json").unlink()
        (out / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()  # half written
        assert latest(out / "checkpoints") == out / "checkpoints" / "checkpoint-2"
        run(done[0], out=out.parent, resume=True)
        found = load_file(out / "model" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        again = (out / "log.jsonl").read_text().splitlines()
        assert [json.loads(x).get("loss") for x in again[:4]] == [
            json.loads(x).get("loss") for x in log[:4]
        ]

    def test_without_resume_nothing_is_overwritten(self, done):
        with pytest.raises(ConfigurationError, match="use --resume"):
            run(done[0], out=done[1])

    def test_another_job_is_refused(self, done):
        step, out, _ = done
        with pytest.raises(ConfigurationError, match=r"another step \(step\)"):
            run(dataclasses.replace(step, seed=1), out=out, resume=True)

    def test_other_data_are_refused(self, done, tmp_path):
        step, out, _ = done
        path = Path(step.data.train)
        before = path.read_text()
        try:
            write_rows(path, ROWS["sft"][:2])
            with pytest.raises(ConfigurationError, match="another data"):
                run(step, out=out, resume=True)
        finally:
            path.write_text(before)

    def test_a_broken_checkpoint_is_refused(self, done, tmp_path):
        out = copied(done, tmp_path) / "sft"
        (out / "report.json").unlink()
        (out / "checkpoints" / "checkpoint-4" / "training.safetensors").write_bytes(b"x")
        with pytest.raises(ConfigurationError, match="not a readable checkpoint"):
            run(done[0], out=out.parent, resume=True)


class TestChain:
    def test_steps_start_from_steps(self, base, tmp_path):
        """An NF4 adapter is merged exactly, learns a reward, and judges a third step."""
        first = make_step(base, tmp_path, "sft", "qlora")
        second = make_step(base, tmp_path, "reward", model=Model(path="step:sft"))
        third = make_step(
            base,
            tmp_path,
            "grpo",
            "ia3",
            model=Model(path="step:sft"),
            reward=Reward(path="step:reward"),
        )
        out = tmp_path / "out"
        reports = run(first, second, third, out=out)
        assert [report["stage"] for report in reports] == ["sft", "reward", "grpo"]
        assert (out / "reward" / "start" / "config.json").exists()
        manifest = read_manifest(out / "grpo" / "model")
        assert manifest is not None
        assert manifest.base == "../start"
        shutil.move(out, tmp_path / "moved")  # an adapter finds its base beside it
        assert open_trained(tmp_path / "moved" / "grpo" / "model")[2] == "language"
        log = (tmp_path / "moved" / "grpo" / "log.jsonl").read_text()
        assert '"reward"' in log

    @pytest.mark.parametrize("quantize", ["none", "nf4"])
    def test_a_merged_adapter_computes_what_the_adapter_did(self, base, tmp_path, quantize):
        step = make_step(base, tmp_path, "sft", quantize=quantize)
        run(step, out=tmp_path / "out")
        adapter = tmp_path / "out" / "sft" / "model"
        whole = starting_folder(adapter, tmp_path / "whole")
        assert not (whole / "adapter_config.json").exists()
        with torch.no_grad():
            one = open_trained(adapter)[0](input_ids=IDS).logits
            two = open_trained(whole)[0](input_ids=IDS).logits
            zero = open_trained(base)[0](input_ids=IDS).logits
        assert (one - two).abs().max() < 1e-4 < (zero - two).abs().max()

    def test_what_cannot_be_merged_is_no_start(self, base, tmp_path):
        run(make_step(base, tmp_path, "sft", "pfeiffer"), out=tmp_path / "out")
        with pytest.raises(ModelError, match=r"cannot be merged .* lora, qlora"):
            starting_folder(tmp_path / "out" / "sft" / "model", tmp_path / "whole")

    def test_a_judge_must_be_a_reward_model(self, base, tmp_path):
        step = make_step(base, tmp_path, "grpo", reward=Reward(path=str(base)))
        with pytest.raises(ModelError, match="expected a reward model, got a language model"):
            run(step, out=tmp_path / "out")


class TestStop:
    def test_it_ends_early_and_keeps_the_best(self, base, tmp_path):
        """At a rate this high the second evaluation is worse than the first."""
        held_out = write_rows(tmp_path / "held-out.jsonl", ROWS["sft"][::-1])
        step = make_step(base, tmp_path, "sft", train={"max_steps": 40, "learning_rate": 3.0})
        step = dataclasses.replace(
            step,
            data=Data(train=step.data.train, evaluation=str(held_out)),
            stop=Stop(patience=2),
        )
        (report,) = run(step, out=tmp_path / "out")
        assert report["steps"] < 40
        best = Path(report["best_checkpoint"])
        found = load_file(tmp_path / "out" / "sft" / "model" / "adapter_model.safetensors")
        kept = load_file(best / "adapter_model.safetensors")
        assert all(torch.equal(found[name], kept[name]) for name in found)
        log = [json.loads(x) for x in (tmp_path / "out/sft/log.jsonl").read_text().splitlines()]
        losses = [line["eval_loss"] for line in log if "eval_loss" in line]
        assert report["evaluation"]["eval_loss"] == pytest.approx(min(losses), abs=1e-4)


class TestUse:
    def rows(self, folder: Path, count: int = 5) -> Path:
        return write_rows(
            folder / "in.jsonl", [{"prompt": f"sign {i}", "n": i} for i in range(count)]
        )

    def test_a_language_model_goes_on_and_resumes(self, done, tmp_path):
        model, data = done[1] / "sft" / "model", self.rows(tmp_path)
        out = tmp_path / "out.jsonl"
        given: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 3}
        assert predict(model, data, out, QUIET, **given) == 5
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["n"] for row in rows] == list(range(5))
        assert all(isinstance(row["prediction"], str) for row in rows)

        whole = out.read_text()
        partial, facts = tmp_path / "b.jsonl.partial", tmp_path / "b.jsonl.from"
        with pytest.raises(DataError, match="no column 'x'"):
            predict(model, data, tmp_path / "b.jsonl", QUIET, column="x", **given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                predict(model, data, tmp_path / "b.jsonl", QUIET, **given)
        partial.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"torn')
        assert facts.exists()
        with pytest.raises(ConfigurationError, match="use --resume"):
            predict(model, data, tmp_path / "b.jsonl", QUIET, **given)
        with pytest.raises(ConfigurationError, match="other options"):
            predict(model, data, tmp_path / "b.jsonl", QUIET, batch_size=3, resume=True)
        predict(model, data, tmp_path / "b.jsonl", QUIET, resume=True, **given)
        assert (tmp_path / "b.jsonl").read_text() == whole
        assert not partial.exists()
        with pytest.raises(ConfigurationError, match="is there already"):
            predict(model, data, out, QUIET, **given)

    def test_a_reward_model_gives_a_number_that_padding_does_not_change(self, base, tmp_path):
        run(make_step(base, tmp_path, "reward"), out=tmp_path / "out")
        rows = [{"text": "sign"}, {"text": "sign fever is fever none none none"}]
        data = write_rows(tmp_path / "in.jsonl", rows)
        model = tmp_path / "out" / "reward" / "model"
        scores = []
        for size in (1, 2):
            out = tmp_path / f"{size}.jsonl"
            predict(model, data, out, QUIET, batch_size=size)
            scores.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert scores[0][0] != scores[0][1]

    def test_another_base_than_the_adapters_is_refused(self, done, tmp_path):
        model = copied(done, tmp_path) / "sft" / "model"
        manifest = json.loads((model / MANIFEST).read_text())
        other = build_base(tmp_path / "other", seed=1)
        (model / MANIFEST).write_text(json.dumps({**manifest, "base": str(other)}))
        with pytest.raises(ModelError, match="was trained on"):
            open_trained(model)


def test_the_commands(base, tmp_path):
    step = make_step(base, tmp_path, "sft")
    job = tmp_path / "job.toml"
    job.write_text(
        f'name = "told"\nstage = "sft"\n[model]\npath = "{base}"\n[tuner]\nr = 2\n'
        f'[data]\ntrain = "{step.data.train}"\n[train]\nmax_steps = 1\nmax_length = 32\n'
    )
    out = tmp_path / "out"
    told = CliRunner().invoke(app, ["train", str(job), "--out", str(out), "--json"])
    assert told.exit_code == 0, told.output
    (report,) = json.loads(told.stdout)
    assert report["steps"] == 1
    assert (out / "curves.html").exists()
    assert (out / "told" / "curves.png").exists()
    data = write_rows(tmp_path / "in.jsonl", [{"prompt": "sign"}])
    asked = ["predict", report["model"], "--data", str(data), "--out", str(tmp_path / "said.jsonl")]
    told = CliRunner().invoke(app, [*asked, "--max-new-tokens", "2", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["rows"] == 1


class TestNothingPhonesHome:
    """TRL asks the hub at every start; what switches that off must hold without CI's help."""

    def watched(self, base: Path, folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        asked = list[str]()

        def look_up(host: Any, *_: Any, **__: Any) -> Any:
            asked.append(str(host))
            raise socket.gaierror("no network in this test")

        patch.setattr(socket, "getaddrinfo", look_up)
        patch.delenv("CI", raising=False)
        step = make_step(base, folder, "sft", train={"max_steps": 1})
        trainer = build(step, base, folder / "checkpoints")
        trainer.train()
        save_trained(trainer, step, base, fingerprint(base), folder / "model", {})
        time.sleep(0.2)  # the question is asked in a thread
        return asked

    def test_no_host_is_looked_up(self, base, tmp_path, monkeypatch):
        assert os.environ["DO_NOT_TRACK"] == "1"
        assert self.watched(base, tmp_path, monkeypatch) == []

    def test_a_look_up_would_be_seen(self, base, tmp_path, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert self.watched(base, tmp_path, monkeypatch)
