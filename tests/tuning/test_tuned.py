from fedward.plan_aggregation import Aggregation
from fedward.tuning.adapter import adapter_state, from_bytes, layout
from fedward.tuning.tuned import tuned_model
from tests.tuning.rig import make_plan


def test_an_equal_plan_finds_its_model_loaded(models):
    plan = make_plan(models["llama"])
    found = tuned_model(plan)
    assert tuned_model(make_plan(models["llama"])) is found
    assert from_bytes(found.start).keys() == adapter_state(found.model).keys()
    assert found.layout == layout(found.model)
    other = tuned_model(make_plan(models["llama"], aggregation=Aggregation(scheme="ffa")))
    assert other is not found
    assert set(other.layout) < set(found.layout)
