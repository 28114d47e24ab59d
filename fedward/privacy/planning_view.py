"""The answers of :mod:`fedward.privacy.planning` for people: a table and a picture."""

from pathlib import Path

from rich.table import Table

from fedward.errors import ConfigurationError
from fedward.privacy.planning import Answer, AtSite, curves


def render_answer(found: Answer) -> Table:
    """The answer as a table of facts; unit and neighbours always come first."""
    question = found.question
    table = Table(title="What privacy costs", title_justify="left", show_header=False)
    table.add_row("unit of privacy", question.unit)
    table.add_row("neighbours", found.neighbours)
    table.add_row("delta", f"{question.delta:g}")
    table.add_row(
        "steps",
        f"({question.rounds} rounds + {question.spare} spare) x {question.steps}, "
        f"sampling rate {question.sampling_rate:g}",
    )
    table.add_section()
    table.add_row("noise multiplier", f"[bold]{found.noise_multiplier:g}[/bold] clips")
    with_metrics = " with metrics" if question.metrics is not None else ""
    table.add_row(f"epsilon{with_metrics} (PRV)", f"[bold]{found.epsilon:.3f}[/bold]")
    second = "dp-accounting is not installed"
    if found.epsilon_pld is not None:
        second = f"{found.epsilon_pld:.3f}"
    table.add_row("  by a second accountant (PLD)", second)
    table.add_row("  after a site's first run (Rényi filter)", f"{found.epsilon_renyi:.3f}")
    if found.epsilon_records is not None:
        table.add_row(
            f"  a patient with {found.records} records, each its own unit",
            f"{found.epsilon_records:.3f}",
        )
    if found.expected_draw is not None:
        table.add_row(f"expected draw of {found.units} units", f"{found.expected_draw:.3g} a step")
    return table


def render_site(site: AtSite) -> Table:
    """What a ledger says, run by run, and what it would still admit."""
    table = Table(
        title=f"At this site: epsilon {site.cap:g} at delta {site.delta:g} for a lifetime",
        title_justify="left",
        caption=(
            f"spent {site.spent:.3f} ({site.alone:.3f} by its own noise alone), with what is "
            f"promised {site.committed:.3f}; a new run like this gets up to {site.rounds_left} "
            "rounds, spares counted"
        ),
        caption_justify="left",
    )
    table.add_column("run")
    for column in ("rounds sent", "still promised", "closed"):
        table.add_column(column, justify="right")
    for run in site.runs:
        table.add_row(run.run, str(run.spent), str(run.left), "yes" if run.closed else "no")
    return table


def save_plot(found: Answer, path: Path) -> None:
    """Draw epsilon over rounds and sigma against epsilon into a picture file.

    Raises:
        ConfigurationError: matplotlib is missing, or the file cannot be written as such a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("--plot needs matplotlib: pip install matplotlib") from error
    over_rounds, over_sigma = curves(found)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip((0.0, 0.0), *over_rounds, strict=True), marker="o")
    left.axvline(found.question.rounds, linestyle="--", color="grey")
    left.set(xlabel="rounds sent (dashed: without spares)", ylabel="epsilon")
    right.plot(*zip(*over_sigma, strict=True), marker="o")
    right.axvline(found.noise_multiplier, linestyle="--", color="grey")
    right.set(xlabel="noise multiplier (dashed: this run)", ylabel="epsilon", xscale="log")
    right.set(yscale="log")
    question = found.question
    figure.suptitle(f"Unit {question.unit}, delta {question.delta:g}, {found.neighbours}")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: the plot cannot be written: {error}") from error
