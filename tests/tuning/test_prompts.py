from collections.abc import Mapping
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fedward.errors import ConfigurationError
from fedward.plan import Data, Task
from fedward.tuning.columns import template_columns
from fedward.tuning.prompts import fill, input_text, segments, uses_chat
from fedward.tuning.small import build_tokenizer
from tests.tuning.rig import TEXTS, make_plan

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Fever?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Cough?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture
def tokenizer():
    return build_tokenizer(TEXTS, 300)


def cut(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **data: Any
) -> list[tuple[str, bool]]:
    plan = make_plan("anywhere", task=Task(max_length=32), data=Data(**data))
    return [(piece.text, piece.learned) for piece in segments(row, plan, tokenizer)]


def test_a_template_puts_columns_in_place_and_nothing_else():
    row = {"age": 70, "note": "{age} {0.__class__}"}
    assert fill("{{{age}}} years: {note}", row) == "{70} years: {age} {0.__class__}"
    assert template_columns("{note} {age} {note} {{no}}") == ["note", "age"]
    assert input_text(row, Data(template="Age {age}")) == "Age 70"


@pytest.mark.parametrize(
    "template", ["{", "}", "{}", "no field", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{ {a} }"]
)
def test_a_template_that_is_none_is_refused(template):
    if template == "{ {a} }":
        assert template_columns("{a} ") == ["a"]
    with pytest.raises(ConfigurationError, match="template"):
        template_columns(template)


def test_plain_text_is_learned_whole_with_its_end(tokenizer):
    assert cut({"text": "Chest pain."}, tokenizer) == [("Chest pain.<eos>", True)]


def test_only_the_completion_is_learned(tokenizer):
    tokenizer.chat_template = None
    row = {"q": "Fever?", "a": "No."}
    expected = [("Fever?", False), ("No.<eos>", True)]
    assert cut(row, tokenizer, prompt="q", completion="a") == expected
    expected[0] = ("Q: Fever? A:", False)
    found = cut(row, tokenizer, prompt="q", completion="a", template="Q: {q} A:")
    assert found == expected


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(tokenizer):
    data = Data(prompt="q", completion="a")
    assert uses_chat(data, tokenizer)
    found = cut({"q": "Fever?", "a": "No."}, tokenizer, prompt="q", completion="a")
    assert found == [("<user>\nFever?<eos>\n<assistant>\n", False), ("No.<eos>\n", True)]


def test_what_the_assistant_says_is_learned_and_nothing_else(tokenizer):
    pieces = cut({"talk": TALK}, tokenizer, messages="talk")
    assert [text for text, learned in pieces if learned] == ["No.<eos>\n", "Yes.<eos>\n"]
    whole = "".join(text for text, _ in pieces)
    assert whole == tokenizer.apply_chat_template(TALK[:-1], tokenize=False)


def test_messages_need_a_chat_template_that_fits(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="has a chat template"):
        cut({"talk": TALK}, tokenizer, messages="talk")
    tokenizer.chat_template = "{{ raise_exception(messages[1]['content']) }}"
    with pytest.raises(ConfigurationError, match="turns system, user") as caught:
        cut({"talk": TALK}, tokenizer, messages="talk")
    assert "Fever" not in str(caught.value)
    assert caught.value.__context__ is None
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigurationError, match="earlier turns anew"):
        cut({"talk": TALK}, tokenizer, messages="talk")


def test_a_role_that_nobody_knows_is_not_repeated(tokenizer):
    """It comes from a record, and may be anything that a file has in that place."""
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    talk = [{"role": "Mrs Roe", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ConfigurationError, match=r"the turns another(, assistant)?$"):
        cut({"talk": talk}, tokenizer, messages="talk")
