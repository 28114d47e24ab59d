"""Which columns a plan reads: known from its words alone, without a record or a model."""

import string

from fedward.errors import ConfigurationError
from fedward.plan import Plan


def template_columns(template: str) -> list[str]:
    """The columns that a template names as ``{column}``, each once.

    Raises:
        ConfigurationError: A brace without its partner, no field, or one that is no plain name.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"[data] template: {error}; write {{{{ for a brace") from error
    fields = [(name, form, how) for _, name, form, how in pieces if name is not None]
    for name, form, how in fields:
        # Attributes, indices and formats would let a template compute; it only puts text in place.
        if not name or form or how or set(name) & set(".[]"):
            raise ConfigurationError(f"[data] template: {{{name}}} must be a column's plain name")
    if not fields:
        raise ConfigurationError("[data] template: expected at least one {column}")
    return list(dict.fromkeys(name for name, _, _ in fields))


def input_columns(plan: Plan) -> list[str]:
    """The columns that make the input of an example."""
    data = plan.data
    if data.template is not None:
        return template_columns(data.template)
    if plan.task.objective == "sft" and data.messages is not None:
        return [data.messages]
    if plan.task.objective != "classify" and data.prompt is not None:
        return [data.prompt]
    return [data.text]


def answer_columns(plan: Plan) -> list[str]:
    """The columns of what follows a prompt: none, the completion, or the better answer first."""
    data = plan.data
    answers = (data.completion, data.chosen, data.rejected)
    return [] if plan.task.objective == "classify" else [a for a in answers if a is not None]


def example_columns(plan: Plan) -> list[str]:
    """The columns that make an example: its input and what is learned of it, each once."""
    columns = [*input_columns(plan), *answer_columns(plan)]
    if plan.task.objective in {"classify", "kto"}:
        columns.append(plan.data.label)
    return list(dict.fromkeys(columns))


def needed_columns(plan: Plan) -> list[str]:
    """The columns that a plan reads, each once: also those that make units and sites."""
    data = plan.data
    by = None if data.split is None else data.split.by
    others = [column for column in (data.unit, data.site, by) if column is not None]
    return list(dict.fromkeys([*example_columns(plan), *others]))
