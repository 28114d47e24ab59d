"""Rows as a model's tokens, made as TRL 1.16 makes them in training.

Text goes through the tokenizer as it is and is closed by the end token; messages go through the
chat template, which writes what it needs.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from fedward.errors import ConfigurationError, DataError, ModelError
from fedward.tuning.prompts import render

Talk: TypeAlias = str | Sequence[Mapping[str, str]]
"""Text, or messages with ``role`` and ``content``."""


def open_ids(prompt: Talk, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that a language model goes on from; at least one.

    Raises:
        ConfigurationError: Messages without a chat template, or one that refuses them.
    """
    if isinstance(prompt, str):
        return _tokens(prompt, tokenizer, special=True)
    return _tokens(_rendered(prompt, tokenizer, generation_prompt=True), tokenizer, special=False)


def closed_ids(prompt: Talk | None, answer: Talk, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt, where there is one, and a finished answer to it; at least one.

    Raises:
        ConfigurationError: Messages without a chat template, or one that refuses them.
        DataError: One is text and the other messages.
    """
    if isinstance(answer, str):
        if not isinstance(prompt, str | None):
            raise DataError("the prompt is messages but the answer is text: give both as one")
        text, end = (prompt or "") + answer, str(tokenizer.eos_token or "")
        closed = text if answer.endswith(end) else text + end
        return _tokens(closed, tokenizer, special=True)
    if isinstance(prompt, str):
        raise DataError("the prompt is text but the answer is messages: give both as one")
    talk = _rendered([*(prompt or ()), *answer], tokenizer)
    return _tokens(talk, tokenizer, special=False)


def answer_start(opened: Sequence[int], closed: Sequence[int]) -> int:
    """Where in the tokens of prompt and answer the answer begins: where they leave the prompt's.

    >>> answer_start([5, 6, 7], [5, 6, 8, 9])
    2
    """
    pairs = zip(opened, closed, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(opened), len(closed)))


def last_turn(messages: Sequence[Mapping[str, str]]) -> tuple[Talk, Talk]:
    """A conversation as what came before the assistant's last turn, and that turn.

    Raises:
        DataError: It does not end with the assistant.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("the last message must be the assistant's")
    return messages[:-1], messages[-1:]


def words(talk: Talk) -> str:
    """Text, or what the messages say."""
    return talk if isinstance(talk, str) else "".join(message["content"] for message in talk)


def _rendered(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation_prompt: bool = False,
) -> str:
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            "messages need a model whose tokenizer has a chat template; give text instead"
        )
    return render(tokenizer, messages, generation_prompt=generation_prompt)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if ids:
        return ids
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError("the text is empty, and the tokenizer has no end token to stand for it")
    return [end]  # a model cannot attend to no token at all
