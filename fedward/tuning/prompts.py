"""Records as text: templates, chat templates, and which parts of the text are to be learned."""

import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedward.errors import ConfigurationError
from fedward.plan import Data, Plan

_ROLES = {"system", "developer", "user", "assistant", "tool"}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of an example's text.

    Args:
        text: The piece.
        learned: Whether its tokens are targets (``sft``).
    """

    text: str
    learned: bool


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with the row's columns in place; braces inside a column stay as they are.

    >>> fill("Q: {question} {{so}}", {"question": "{why}?"})
    'Q: {why}? {so}'
    """
    return "".join(
        text + ("" if name is None else str(row[name]))
        for text, name, _, _ in string.Formatter().parse(template)
    )


def input_text(row: Mapping[str, Any], data: Data) -> str:
    """The input of one record: the template with its columns filled in, or the text column."""
    return str(row[data.text]) if data.template is None else fill(data.template, row)


def uses_chat(data: Data, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template renders the records."""
    return data.messages is not None or (
        data.prompt is not None and tokenizer.chat_template is not None
    )


def segments(
    row: Mapping[str, Any],
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    answer: str | None = None,
) -> list[Segment]:
    """The text of one record, cut into what is given and what is learned.

    Messages: what the assistant says is learned. Prompt and answer: the answer is, through the
    tokenizer's chat template where it has one. Plain text: all of it is.

    Args:
        row: The record.
        plan: Names its columns.
        tokenizer: The model's.
        answer: Column of the answer; left out, the plan's ``completion``, if it has one.

    Raises:
        ConfigurationError: ``messages`` with a tokenizer that has no chat template, or one that
            refuses these roles or renders earlier turns anew.
    """
    data, end = plan.data, str(tokenizer.eos_token or "")
    if data.messages is not None:
        return _chat(row[data.messages], tokenizer)
    answer = answer or data.completion
    if data.prompt is None or answer is None:
        return [Segment(text=input_text(row, data) + end, learned=True)]
    prompt = str(row[data.prompt]) if data.template is None else fill(data.template, row)
    completion = str(row[answer])
    if uses_chat(data, tokenizer):
        turns = [("user", prompt), ("assistant", completion)]
        return _chat([{"role": role, "content": text} for role, text in turns], tokenizer)
    return [Segment(text=prompt, learned=False), Segment(text=completion + end, learned=True)]


def _chat(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Render up to and after each turn of the assistant; what follows the last one is dropped."""
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            "[data] messages needs a model whose tokenizer has a chat template; "
            "use text, or prompt and completion"
        )
    pieces: list[Segment] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], generation_prompt=True)
        after = render(tokenizer, messages[: number + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise ConfigurationError(
                "the model's chat template renders earlier turns anew, so that the assistant's "
                "words cannot be told apart; use prompt and completion, or another template"
            )
        pieces.append(Segment(text=before[len(done) :], learned=False))
        pieces.append(Segment(text=after[len(before) :], learned=True))
        done = after
    return [piece for piece in pieces if piece.text]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    generation_prompt: bool = False,
) -> str:
    """Messages as the tokenizer's chat template writes them; no messages are empty text.

    Args:
        tokenizer: Has a chat template.
        messages: Turns with ``role`` and ``content``.
        generation_prompt: Whether the assistant's next turn is begun.

    Raises:
        ConfigurationError: The template refuses these roles; no word of the content is told.
    """
    if not messages:
        return ""
    text: str | None = None
    with suppress(TemplateError):
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        )
    if text is None:  # raised here, because a template's own message may quote the conversation
        given = [message["role"] for message in messages]  # a record's, so only known words
        roles = ", ".join(role if role in _ROLES else "another" for role in given)
        raise ConfigurationError(f"the model's chat template refuses the turns {roles}")
    return text
