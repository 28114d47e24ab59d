"""``[train]`` of the stage ``classify``: transformers' keys, and how long a text may be."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class ClassifyConfig(TrainingArguments):
    """What transformers' trainer takes.

    Args:
        max_length: Tokens after which a text is cut, 1 or more.
        learning_rate: As TRL's for the other stages that train a head.
        logging_steps: As TRL's.
    """

    max_length: int = field(default=1024)
    learning_rate: float = field(default=1e-4)
    logging_steps: float = field(default=10)

    def __post_init__(self) -> None:
        """Check every limit."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # theirs
        if self.max_length < 1:
            raise ValueError(f"max_length: expected 1 or more, got {self.max_length}")
