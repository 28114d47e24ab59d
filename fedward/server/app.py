"""The coordinator's Flower ServerApp: it hands Flower's grid to the round engine."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.server.rounds import RoundEngine


def server_app(engine: RoundEngine) -> ServerApp:
    """Make the ServerApp that runs (or goes on with) the engine's run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        engine.run(grid)

    return app
