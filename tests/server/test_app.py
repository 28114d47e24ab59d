"""The ServerApp runs the engine over whatever grid Flower gives it."""

import pytest
from flwr.app import Context, RecordDict

from fedward.errors import RoundError
from fedward.server.app import server_app
from tests.client.desk import other_plan
from tests.server.test_rounds import Rig

CONTEXT = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_the_app_runs_every_round_over_the_grid(rig):
    server_app(rig.engine())(grid=rig.grid, context=CONTEXT)
    assert rig.cohorts == [[0, 1, 2, 3]] * 3


def test_an_error_of_the_engine_ends_the_app(rig):
    server_app(rig.engine())(grid=rig.grid, context=CONTEXT)
    with pytest.raises(RoundError, match="another plan"):
        server_app(rig.engine(plan=other_plan()))(grid=rig.grid, context=CONTEXT)
