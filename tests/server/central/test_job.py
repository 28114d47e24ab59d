"""What a job may say: keys, values, what goes together, and records; and that the page says so."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ConfigurationError, DataError
from fedward.server.central.data import read_dataset
from fedward.server.central.job import STAGES, Data, Job, Reward, Step, Stop, Train, load_job
from fedward.server.central.rewards import rule
from fedward.server.central.settings import load_class, settings
from fedward.server.central.validity import BASES, check_step, refusal
from fedward.tuning.methods import METHODS
from tests.server.central.rig import ROWS, make_step, write_rows

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "central-training.md"
JOB = """
name = "answers"
stage = "sft"
[model]
path = "m"
[data]
train = "t.jsonl"
"""
CHAIN = """
name = "chain"
[[steps]]
name = "one"
stage = "sft"
model = { path = "m" }
data = { train = "t.jsonl" }
[[steps]]
name = "two"
stage = "grpo"
model = { path = "step:one" }
data = { train = "t.jsonl" }
reward = { pattern = "yes" }
"""


def load(folder: Path, text: str) -> Job:
    path = folder / "job.toml"
    path.write_text(text)
    return load_job(path)


def test_a_job_of_one_step_and_one_of_several(tmp_path):
    one, chain = load(tmp_path, JOB), load(tmp_path, CHAIN)
    assert [step.name for step in one.steps] == [one.name] == ["answers"]
    assert one.steps[0].tuner.method == "lora"
    assert [step.stage for step in chain.steps] == ["sft", "grpo"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (JOB.replace('"sft"', '"stf"'), "stage = 'stf': expected one of 'sft'"),
        (JOB.replace('"answers"', '"An swers"'), "a-z, 0-9"),
        (JOB.replace("train =", "trian ="), r"\[data\] unknown key 'trian'; did you mean 'train'"),
        (JOB.replace('path = "m"', ""), r"\[model\] missing key 'path'"),
        (JOB + "[train]\nwhen = 1979-05-27", "when = .*expected text, numbers"),
        (JOB + "[stop]\npatience = 2", "needs .* evaluation"),
        (JOB + "[reward]\npattern = 'x'", "has no section"),
        (JOB.replace('"sft"', '"ppo"'), "needs section"),
        (JOB.replace('"sft"', '"distill"'), "needs key 'teacher'"),
        (JOB.replace('"sft"', '"ppo"') + "[reward]\npattern = '('", "not a regular expression"),
        (JOB.replace('"sft"', '"ppo"') + "[reward]\n", "one of path, pattern and column"),
        (CHAIN.replace("step:one", "step:six"), "an earlier step: one"),
        (CHAIN.replace('"two"', '"one"'), "another name for each step"),
        ("steps = []\nname = 'x'", "at least one"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_job_that_is_wrong_is_refused_with_file_and_key(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message) as found:
        load(tmp_path, text)
    assert "job.toml" in str(found.value)


def test_a_job_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file"):
        load_job(tmp_path / "none.toml")


class TestWhatGoesTogether:
    def test_the_table_refuses_few_and_says_why(self):
        cells = list(itertools.product(STAGES, METHODS, BASES))
        refused = {cell: why for cell in cells if (why := refusal(*cell)) is not None}
        assert 0 < len(refused) < len(cells) / 3
        assert all(len(why) > 20 for why in refused.values())

    @pytest.mark.parametrize(
        ("stage", "method", "base", "message"),
        [
            ("sft", "full", "nf4", "cannot be trained: use a tuner"),
            ("sft", "qlora", "none", "set quantize = 'nf4'"),
            ("distill", "prefix", "none", "distillation loss"),
            ("orpo", "prompt", "none", "positions"),
            ("rloo", "p-tuning", "nf4", "padded on the left"),
        ],
    )
    def test_a_cell_is_refused_before_a_model_is_loaded(
        self, tmp_path, stage, method, base, message
    ):
        step = make_step(Path("/no/such/model"), tmp_path, stage, method, quantize=base)
        with pytest.raises(ConfigurationError, match=message):
            check_step(step)

    def test_a_good_step_passes(self, tmp_path):
        check_step(make_step(Path("/no/such/model"), tmp_path, "dpo", "dora", quantize="nf4"))


class TestSettings:
    def step(self, folder: Path, **train: Any) -> Step:
        return make_step(Path("m"), folder, "sft", train=train)

    def test_keys_are_trls_and_nothing_is_reported(self, tmp_path):
        found = settings(self.step(tmp_path, lr_scheduler_type="cosine"), tmp_path)
        assert found.lr_scheduler_type == "cosine"
        assert found.max_length == 32
        assert found.report_to == []
        assert not found.bf16
        assert not found.activation_checkpointing
        assert not found.push_to_hub

    @pytest.mark.parametrize(
        ("train", "message"),
        [
            ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
            ({"max_steps": "ten"}, "max_steps = 'ten': expected a value of type int"),
            ({"packing": 1}, "expected a value of type bool"),
            ({"output_dir": "x"}, "follows from the rest"),
            ({"push_to_hub": True}, "unknown key"),
            ({"hub_token": "x"}, "unknown key"),
            ({"trust_remote_code": True}, "follows from the rest"),
            ({"report_to": "wandb"}, "'report_to' follows from the rest of the job"),
            ({"lr_scheduler_type": "spiral"}, "TRL refuses it"),
        ],
    )
    def test_what_trl_has_not_or_must_not(self, tmp_path, train, message):
        with pytest.raises(ConfigurationError, match=message):
            settings(self.step(tmp_path, **train), tmp_path)

    def test_a_quantised_base_needs_bfloat16(self, tmp_path):
        step = make_step(Path("m"), tmp_path, "sft", quantize="nf4")
        assert settings(step, tmp_path).bf16
        with pytest.raises(ConfigurationError, match="true over a quantised base"):
            settings(dataclasses.replace(step, train=Train(arguments={"bf16": False})), tmp_path)

    @pytest.mark.parametrize("stage", STAGES)
    def test_every_stage_has_its_classes(self, stage):
        assert load_class(stage, "config").__name__.endswith("Config")
        assert load_class(stage, "trainer").__name__.endswith("Trainer")


class TestRecords:
    def read(self, folder: Path, stage: Any, rows: list[Any], **columns: str) -> list[Any]:
        step = make_step(Path("m"), folder, stage)
        path = write_rows(folder / "rows.jsonl", rows)
        step = dataclasses.replace(step, data=Data(train=str(path), columns=columns))
        return list(read_dataset(path, step))

    @pytest.mark.parametrize("stage", STAGES)
    def test_each_stage_reads_its_columns(self, tmp_path, stage):
        assert self.read(tmp_path, stage, ROWS[stage]) == ROWS[stage]

    def test_a_file_may_have_names_of_its_own(self, tmp_path):
        rows = [{"question": "a?", "answer": "b", "id": 3}]
        found = self.read(tmp_path, "sft", rows, prompt="question", completion="answer")
        assert found == [{"prompt": "a?", "completion": "b"}]

    def test_messages_keep_role_and_content(self, tmp_path):
        messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
        rows = [{"messages": [{**message, "name": "x"} for message in messages]}]
        assert self.read(tmp_path, "sft", rows) == [{"messages": messages}]

    @pytest.mark.parametrize(
        ("stage", "rows", "message"),
        [
            ("dpo", [{"prompt": "a", "chosen": "b"}], "no column 'rejected'"),
            ("sft", [{"text": 3}], "row 1: column 'text' must hold text"),
            ("sft", [{"messages": [{"role": "user"}]}], "row 1: column 'messages'"),
            ("kto", [{"prompt": "a", "completion": "b", "label": "maybe"}], "true or false"),
            ("kto", [{"prompt": "a", "completion": "b", "label": None}], "true or false"),
            ("sft", [], "no records"),
        ],
    )
    def test_records_that_do_not_fit(self, tmp_path, stage, rows, message):
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, stage, rows)

    def test_a_column_that_the_stage_does_not_read(self, tmp_path):
        with pytest.raises(ConfigurationError, match="reads chosen, prompt, rejected, not 'text'"):
            self.read(tmp_path, "dpo", ROWS["dpo"], text="x")


def test_rules_give_one_or_nothing():
    said = ["yes, fever", "no", [{"role": "assistant", "content": "yes"}]]
    assert rule(Reward(pattern="^yes"))(completions=said) == [1.0, 0.0, 1.0]
    found = rule(Reward(column="word"))(completions=said, word=["fever", "fever", "yes"])
    assert found == [1.0, 0.0, 1.0]


class TestThePage:
    def test_it_shows_the_tables_as_the_command_prints_them(self):
        printed = CliRunner().invoke(app, ["train", "--tuners"]).stdout
        shown = PAGE.read_text().partition("<!-- tuners -->\n")[2].partition("<!-- /tuners -->")[0]
        assert shown == printed, f"docs/central-training.md needs\n\n{printed}"

    def test_its_job_is_a_job(self, tmp_path):
        (step,) = load(tmp_path, PAGE.read_text().split("```toml\n")[1].split("```")[0]).steps
        check_step(step)
        settings(step, tmp_path)

    @pytest.mark.parametrize("section", [Step, Data, Reward, Stop])
    def test_it_names_every_key(self, section):
        rows = "".join(re.findall(r"^\|.*\|$", PAGE.read_text(), re.MULTILINE))
        for field in dataclasses.fields(section):
            assert f"`{field.name}`" in rows or f"`[{field.name}]`" in rows, field.name


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "central").glob("*.toml")))
def test_every_example_is_a_job_that_trl_takes(path, tmp_path):
    text = path.read_text()
    assert f"fedward train examples/central/{path.name}" in text
    for step in load_job(path).steps:
        check_step(step)
        settings(step, tmp_path)


def test_a_job_is_asked_for():
    done = CliRunner().invoke(app, ["train"])
    assert isinstance(done.exception, ConfigurationError)
    assert json.dumps(str(done.exception)).startswith('"name a JOB')
