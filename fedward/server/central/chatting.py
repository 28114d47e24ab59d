"""A conversation in the terminal with a language model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from fedward.errors import ModelError
from fedward.server.central.inputs import Talk, open_ids
from fedward.server.central.opening import Opened
from fedward.server.central.predicting import longest

HELP = "/reset forgets what was said, /quit leaves, Ctrl-C stops an answer."

Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a model answers.

    Args:
        system: What it is told first; None: nothing.
        max_new_tokens: Longest answer, 1 or more.
        temperature: 0 takes the likeliest word always; more is more varied.
    """

    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(kw_only=True)
class Conversation:
    """What was said so far.

    Args:
        opened: A language model.
        manner: How it answers.
        turns: ``(what was said, the answer)``, the oldest first.
    """

    opened: Opened
    manner: Manner
    turns: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what cannot talk.

        Raises:
            ModelError: The model is not a language model, or has no template for ``system``.
        """
        if self.opened.kind != "language":
            raise ModelError(
                f"{self.opened.name}: a {self.opened.kind} model writes nothing; chat needs a "
                "language model (fedward predict uses the others)"
            )
        if self.manner.system is not None and self.plain:
            raise ModelError(f"{self.opened.name}: its tokenizer has no chat template for --system")

    @property
    def plain(self) -> bool:
        """Whether there is no chat template, so that the model goes on with the text itself."""
        return self.opened.tokenizer.chat_template is None

    def answer(self, said: str, show: Show) -> bool:
        """Show the model's answer piece by piece, and remember it.

        Args:
            said: By the user.
            show: Called with each piece.

        Returns:
            False where Ctrl-C stopped it; what was shown is remembered.
        """
        ids, dropped = self._fitting(said)
        self.turns = self.turns[dropped:]
        pieces = list[str]()

        def tell(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            self._generate(ids, tell)
        except KeyboardInterrupt:
            return False
        else:
            return True
        finally:
            self.turns.append((said, "".join(pieces)))

    def _fitting(self, said: str) -> tuple[list[int], int]:
        """Tokens to go on from, without the oldest turns where all are too long; how many those."""
        most = longest(self.opened.model, self.opened.tokenizer)
        room, dropped = max(1, most - self.manner.max_new_tokens), 0
        ids = self._ids(said, dropped)
        while len(ids) > room and dropped < len(self.turns):
            dropped += 1
            ids = self._ids(said, dropped)
        return ids[-room:], dropped

    def _ids(self, said: str, dropped: int) -> list[int]:
        return open_ids(self._talk(self.turns[dropped:], said), self.opened.tokenizer)

    def _talk(self, turns: list[tuple[str, str]], said: str) -> Talk:
        if self.plain:
            return "".join(f"{one}{answer}\n" for one, answer in turns) + said
        system = self.manner.system
        talk = [] if system is None else [{"role": "system", "content": system}]
        for one, answer in turns:
            talk += [{"role": "user", "content": one}, {"role": "assistant", "content": answer}]
        return [*talk, {"role": "user", "content": said}]

    @torch.no_grad()
    def _generate(self, ids: list[int], show: Show) -> None:
        model, tokenizer = self.opened.model, self.opened.tokenizer
        given = torch.tensor([ids], device=model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.manner.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.manner.temperature}
        model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=self.manner.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Pieces(tokenizer, show),
            **sampling,
        )


class _Pieces(TextStreamer):
    """Hands on each piece of text as soon as it is whole."""

    def __init__(self, tokenizer: Any, show: Show) -> None:  # noqa: ANN401  # theirs
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with text that later tokens do not change."""
        if text:
            self._show(text)


def talk(conversation: Conversation, read: Callable[[], str | None], show: Show) -> None:
    """Answer line by line until there are no more.

    Args:
        conversation: With whom.
        read: The next line; None at the end.
        show: Called with each piece of text, line breaks included.
    """
    show(f"{HELP}\n")
    if conversation.plain:
        show("The model has no chat template: it goes on with what you write.\n")
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            show(f"\n{HELP}\n")
            continue
        said = "" if line is None else line.strip()
        if line is None or said == "/quit":
            return
        if said == "/reset":
            conversation.turns.clear()
            show("Forgotten.\n")
        elif said.startswith("/"):
            show(f"{HELP}\n")
        elif said:
            whole = conversation.answer(said, show)
            show("\n" if whole else "\n(stopped)\n")
