from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.plan import Data, Task
from fedward.tuning.models import load_base
from fedward.tuning.objectives import (
    IGNORED,
    Encoded,
    Example,
    collate,
    encode,
    loss_and_logits,
    loss_per_example,
)
from fedward.tuning.records import Records, group
from tests.tuning.rig import LABELS, ROWS, TEXTS, make_plan

SFT = Task(max_length=32)
RECORDS = group(ROWS[:6], "patient")
PAIRS = group([{"q": "Any fever or cough?", "a": "No fever."}, {"q": "?", "a": TEXTS[0]}], None)


@pytest.fixture(scope="module")
def llama(models):
    base, tokenizer = load_base(make_plan(models["llama"]).model, SFT)
    return base, tokenizer


def encoded(
    folder: Path, records: Records, task: Task, **data: Any
) -> tuple[PreTrainedModel, Encoded]:
    plan = make_plan(folder, task=task, data=Data(**data))
    base, tokenizer = load_base(plan.model, task)
    return base, encode(records, tokenizer, plan)


class TestLoss:
    @pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
    def test_of_classify_depends_on_the_example_alone(self, models, name):
        task = Task(objective="classify", labels=LABELS, max_length=32)
        base, examples = encoded(models[name], RECORDS, task)
        with torch.no_grad():
            together = loss_per_example(base, collate(examples, range(6), "cpu"))
            alone = [loss_per_example(base, collate(examples, [i], "cpu"))[0] for i in range(6)]
        assert together.shape == (6,)
        assert together.dtype == torch.float32
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)

    def test_of_sft_depends_on_the_example_alone(self, models):
        base, examples = encoded(models["llama"], PAIRS, SFT, prompt="q", completion="a")
        with torch.no_grad():
            together = loss_per_example(base, collate(examples, [0, 1], "cpu"))
            alone = [loss_per_example(base, collate(examples, [i], "cpu"))[0] for i in (0, 1)]
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)

    def test_of_sft_is_the_mean_over_its_own_targets(self, models):
        base, examples = encoded(models["llama"], PAIRS, SFT, prompt="q", completion="a")
        batch = collate(examples, [0, 1], "cpu")
        with torch.no_grad():
            found, logits = loss_and_logits(base, batch)
            usual = base(**batch).loss
        for row, example in enumerate(examples.examples):
            terms = [
                -log_softmax(logits[row, place - 1], dim=0)[target]
                for place, target in enumerate(example.targets)
                if place > 0 and target != IGNORED
            ]
            torch.testing.assert_close(found[row], torch.stack(terms).mean())
        # The control: the library's loss is over the batch's tokens, so that examples couple.
        assert abs(float(usual - found.mean())) > 1e-4

    def test_without_targets_is_zero_with_zero_gradient(self, llama):
        base = llama[0]
        nothing = Example(tokens=(5, 6), targets=(IGNORED, IGNORED))
        alone = Encoded(examples=(nothing,), padding=0, classify=False)
        weight = base.lm_head.weight.requires_grad_()
        loss = loss_per_example(base, collate(alone, [0], "cpu"))
        loss.sum().backward()  # type: ignore[no-untyped-call]  # torch's has no annotations
        assert loss.tolist() == [0.0]
        assert not weight.grad.any()
        weight.requires_grad_(False)


class TestEncode:
    def test_plain_text_is_its_own_target_and_ends(self, models):
        _, examples = encoded(models["llama"], RECORDS, Task(max_length=64))
        first = examples.examples[0]
        assert first.tokens == first.targets
        assert first.tokens[-1] == 1

    def test_only_the_completion_is_a_target(self, models, llama):
        _, examples = encoded(models["llama"], PAIRS, SFT, prompt="q", completion="a")
        first = examples.examples[0]
        learned = [target for target in first.targets if target != IGNORED]
        assert llama[1].decode(learned).strip() == "No fever.<eos>"
        assert len(first.tokens) == len(first.targets)
        assert all(
            t in (IGNORED, token) for t, token in zip(first.targets, first.tokens, strict=True)
        )

    def test_a_long_prompt_gives_way_to_the_completion(self, models, llama):
        rows = group([{"q": " ".join(TEXTS[:4]), "a": "No fever."}], None)
        _, examples = encoded(
            models["llama"], rows, Task(max_length=20), prompt="q", completion="a"
        )
        (only,) = examples.examples
        assert len(only.tokens) == 20
        assert llama[1].decode([t for t in only.targets if t != IGNORED]).strip() == (
            "No fever.<eos>"
        )

    @pytest.mark.parametrize("name", ["llama", "bert"])
    def test_long_and_empty_texts_classify(self, models, name):
        task = Task(objective="classify", labels=LABELS, max_length=8)
        rows = [{"text": text, "label": "surgery"} for text in (" ".join(TEXTS), "", " ")]
        base, examples = encoded(models[name], group(rows, None), task)
        lengths = [len(example.tokens) for example in examples.examples]
        assert lengths[0] == 8
        assert min(lengths) >= 1
        with torch.no_grad():
            assert torch.isfinite(loss_per_example(base, collate(examples, [0, 1, 2], "cpu"))).all()

    def test_an_empty_text_learns_to_end(self, models):
        base, examples = encoded(models["llama"], group([{"text": ""}], None), SFT)
        with torch.no_grad():
            assert torch.isfinite(loss_per_example(base, collate(examples, [0], "cpu"))).all()

    def test_the_first_token_comes_from_the_tokenizer_or_the_chat_template_not_both(self, models):
        plan = make_plan(models["llama"], task=SFT)
        tokenizer = load_base(plan.model, SFT)[1]
        tokenizer.bos_token = tokenizer.eos_token
        text = encode(RECORDS, tokenizer, plan).examples[0]
        assert text.tokens[0] == tokenizer.bos_token_id
        assert text.targets[0] == IGNORED
        pairs = make_plan(models["llama"], task=SFT, data=Data(prompt="q", completion="a"))
        assert encode(PAIRS, tokenizer, pairs).examples[0].tokens[0] != tokenizer.bos_token_id

    def test_a_label_that_is_not_the_plans_is_not_quoted(self, models):
        rows = group([{"text": "x", "label": "surgery"}, {"text": "x", "label": "SECRET"}], None)
        task = Task(objective="classify", labels=LABELS, max_length=32)
        with pytest.raises(DataError, match="record 2") as caught:
            encoded(models["llama"], rows, task)
        assert "SECRET" not in str(caught.value)

    def test_a_tokenizer_without_padding_is_refused(self, llama, models):
        tokenizer = load_base(make_plan(models["llama"]).model, SFT)[1]
        tokenizer.pad_token = None
        with pytest.raises(ModelError, match="padding"):
            encode(RECORDS, tokenizer, make_plan(models["llama"], task=SFT))

    def test_messages_without_a_chat_template(self, models):
        plan = make_plan(models["llama"], task=SFT, data=Data(messages="talk"))
        tokenizer = load_base(plan.model, SFT)[1]
        tokenizer.chat_template = None
        talk = group([{"talk": [{"role": "assistant", "content": "Hi"}]}], None)
        with pytest.raises(ConfigurationError, match="chat template"):
            encode(talk, tokenizer, plan)

    def test_no_records_at_all(self, models):
        for task in (SFT, Task(objective="classify", labels=LABELS, max_length=32)):
            assert encoded(models["llama"], group([], None), task)[1].examples == ()


def test_a_batch_is_padded_on_the_right_to_its_longest():
    examples = tuple(
        Example(tokens=tuple(range(2, 2 + n)), targets=tuple(range(2, 2 + n))) for n in (3, 1, 9)
    )
    batch = collate(Encoded(examples=examples, padding=0, classify=False), [1, 0], "cpu")
    assert batch["input_ids"].tolist() == [[2, 0, 0], [2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[2, IGNORED, IGNORED], [2, 3, 4]]
