"""``fedward privacy COMMAND``."""

import typer

privacy_app = typer.Typer(
    no_args_is_help=True,
    help="Plan what privacy costs, and test by attack that it is kept.",
)
