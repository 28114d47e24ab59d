"""What a run survives: a gate without a number, and liars in several groups of sites."""

import dataclasses
import math

import numpy as np
import pytest

from fedward.attempt import Attempt
from fedward.plan_aggregation import Cohort
from fedward.plan_gate import Gate
from fedward.server.gate import judge
from fedward.server.store import Phase
from fedward.server.suspects import proven
from tests.client.desk import PLAN, RUN, START
from tests.server.test_rounds import Rig

GATED = dataclasses.replace(PLAN, gate=Gate(data="x", refusals=9))
GROUPED = dataclasses.replace(PLAN, cohort=Cohort(minimum=3, colluders=1, groups=3))


@pytest.fixture
def make_rig(tmp_path):
    rigs = list[Rig]()

    def make(**options):
        rigs.append(Rig(tmp_path, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize("start", [math.inf, math.nan])
def test_a_start_without_a_finite_loss_ends_no_run(make_rig, start):
    """The figures of its first rounds say null, and are read again at every restart."""
    rig = make_rig(plan=GATED)

    def loss(adapter: bytes) -> float:
        return start if adapter == START else 2.0

    last = rig.run(gate=loss)
    assert [facts["gate"]["after"] for _, facts in rig.facts(Phase.COMMITTED)] == [2.0] * 3
    assert rig.facts(Phase.COMMITTED)[0][1]["gate"]["lowest"] is None
    assert rig.run(gate=loss) == last, "a restart reads the same events"
    assert judge(Gate(data="x"), lambda _: math.inf, b"", b"1", np.zeros(4))[0], "inf is no loss"


def test_liars_of_two_groups_put_no_honest_site_out(make_rig):
    """Two sums of other groups were too long, and one honest site was in both."""
    suspects = [[1, 2, 3], [3, 4, 5]]
    assert proven([frozenset(group) for group in suspects], 1) == {3}, "if all had one sum"
    rig = make_rig(plan=GROUPED, sites=9)
    attempt = Attempt(run=RUN, round=1)
    rig.store.record(attempt, Phase.STARTED, {"plan": GROUPED.hash().hex()})
    rig.store.record(attempt, Phase.ABORTED, {"reason": "too long", "suspects": suspects})
    rig.run()
    assert rig.cohorts == [list(range(9))] * 3
