"""What a completion is worth: a reward model's number, or a rule that anybody can check."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fedward.server.central.job import Reward

Rule: TypeAlias = Callable[..., list[float]]
"""Rewards of some completions, from ``completions`` and the columns of their rows."""


def rule(reward: Reward) -> Rule:
    """The rule of a ``[reward]`` that names a pattern or a column: 1 where it holds, else 0."""
    if reward.pattern is not None:
        pattern = re.compile(reward.pattern)

        def matches(completions: Sequence[Any], **_: Any) -> list[float]:  # noqa: ANN401  # TRL's
            return [float(pattern.search(_text(each)) is not None) for each in completions]

        return matches
    column = str(reward.column)

    def contains(completions: Sequence[Any], **columns: Any) -> list[float]:  # noqa: ANN401  # TRL's
        wanted = columns[column]
        return [float(w in _text(each)) for each, w in zip(completions, wanted, strict=True)]

    return contains


def _text(completion: object) -> str:
    """A completion's text: plain, or of the messages that TRL makes of a conversation."""
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list):
        return ""
    return "".join(str(message["content"]) for message in completion)
