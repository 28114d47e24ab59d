"""A conversation: remembered, forgotten, stopped, cut to what the model can read."""

import signal

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.errors import ModelError
from fedward.server.central.chatting import Conversation, Manner
from fedward.server.central.opening import open_model
from tests.server.central.rig import build_base, make_step, run

MESSAGES = [{"role": "user", "content": "sign fever"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def conversation(base):
    return Conversation(opened=open_model(str(base)), manner=Manner(max_new_tokens=8))


def plain(conversation: Conversation) -> Conversation:
    conversation.opened.tokenizer.chat_template = None
    return conversation


def test_pieces_make_the_greedy_answer(conversation):
    pieces = list[str]()
    assert conversation.answer("sign fever", pieces.append)
    tokenizer, model = conversation.opened.tokenizer, conversation.opened.model
    given = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == expected != ""
    assert conversation.turns == [("sign fever", expected)]


def test_what_was_said_is_part_of_the_next_question(conversation):
    conversation.turns = [("one", "two")]
    talk = conversation._talk(conversation.turns, "three")
    assert [(t["role"], t["content"]) for t in talk] == [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]
    assert plain(conversation)._talk([("one", " two")], "three") == "one two\nthree"


def test_the_oldest_turns_give_way(conversation):
    conversation.turns = [("sign cough " * 10, "is cough"), ("sign rash", "is rash")]
    conversation.answer("sign fever", lambda _: None)
    assert [said for said, _ in conversation.turns] == ["sign rash", "sign fever"]
    conversation.answer("sign cough " * 200, lambda _: None)  # alone too long, and still answered
    assert len(conversation.turns) == 1


@pytest.fixture
def interruptible():
    """Where a shell started the tests in the background, Ctrl-C is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_stops_the_answer_alone(conversation):
    shown = list[str]()

    def show(piece: str) -> None:
        shown.append(piece)
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C does

    manner = Manner(max_new_tokens=50)
    conversation = Conversation(opened=conversation.opened, manner=manner)
    assert not conversation.answer("sign fever", show)
    assert conversation.turns == [("sign fever", shown[0])]
    assert conversation.answer("sign rash", lambda _: None)


def test_varied_answers_vary(conversation):
    hot = Manner(max_new_tokens=16, temperature=5.0)
    answers = set()
    for _ in range(3):
        conversation = Conversation(opened=conversation.opened, manner=hot)
        conversation.answer("sign", lambda _: None)
        answers.add(conversation.turns[0][1])
    assert len(answers) > 1


def test_only_a_language_model_talks(base, tmp_path):
    run(make_step(base, tmp_path, "reward"), out=tmp_path / "out")
    told = CliRunner().invoke(app, ["chat", str(tmp_path / "out" / "reward" / "model")])
    assert isinstance(told.exception, ModelError)
    assert "a reward model writes nothing" in str(told.exception)


def test_a_system_text_needs_a_template(conversation):
    opened = plain(conversation).opened
    with pytest.raises(ModelError, match="no chat template"):
        Conversation(opened=opened, manner=Manner(system="be brief"))


def test_the_command(base):
    lines = "sign fever\n\n/what\n/reset\nsign rash\n/quit\nnever read\n"
    asked = ["chat", str(base), "--max-new-tokens", "4", "--temperature", "1", "--seed", "3"]
    told = CliRunner().invoke(app, asked, input=lines)
    assert told.exit_code == 0, told.output
    assert told.output.count("/quit leaves") == 2  # at the start, and after /what
    assert "Forgotten." in told.output
    again = CliRunner().invoke(app, asked, input=lines)
    assert again.output == told.output
    at_the_end = CliRunner().invoke(app, ["chat", str(base)], input="")
    assert at_the_end.exit_code == 0
