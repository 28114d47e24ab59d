"""DPO and KTO: the losses are TRL's, each of its own record, the plan's start the reference."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from fedward.errors import DataError
from fedward.plan import Data, Plan, Task
from fedward.tuning.adapter import from_bytes, load_adapter
from fedward.tuning.metrics import evaluate
from fedward.tuning.objectives import (
    Encoded,
    collate,
    encode,
    loss_per_example,
    referred,
    scores,
)
from fedward.tuning.records import group, read_records
from fedward.tuning.tuned import Tuned, tuned_model, with_reference
from fedward.tuning.tuners import trainable
from tests.privacy.tiny import released
from tests.simulations.tiny import write_data
from tests.tuning.rig import make_plan

PAIRS = [
    {"prompt": f"Any {word}?", "chosen": f" No {word}.", "rejected": f" {word} since Monday, yes."}
    for word in ("fever", "cough", "headache", "pain", "wound")
]
SINGLE = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair in PAIRS
    for key in ("chosen", "rejected")
]
ROWS: dict[str, Sequence[dict[str, Any]]] = {"dpo": PAIRS, "kto": SINGLE}
COLUMNS = {
    "dpo": Data(prompt="prompt", chosen="chosen", rejected="rejected"),
    "kto": Data(prompt="prompt", completion="completion"),
}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}

both = pytest.mark.parametrize("objective", ["dpo", "kto"])


def plan_of(folder: Path, objective: Any, **changes: Any) -> Plan:
    task = Task(objective=objective, max_length=32, **changes)
    return make_plan(folder, task=task, data=COLUMNS[objective])


def prepared(plan: Plan) -> tuple[Tuned, Encoded]:
    """A model of its own at the plan's start, and all rows; plain text, as TRL reads it."""
    tuned = tuned_model.__wrapped__(plan)
    tuned.tokenizer.chat_template = None
    rows = group(ROWS[plan.task.objective], None)
    return tuned, with_reference(tuned, encode(rows, tuned.tokenizer, plan))


def shake(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def losses(model: Any, encoded: Encoded, rows: Any = None) -> torch.Tensor:
    return loss_per_example(model, collate(encoded, rows or range(len(encoded.examples)), "cpu"))


def trl(folder: Path, tuned: Tuned, objective: str, **changes: Any) -> Any:
    """TRL's trainer of a copy of the model; its reference is a copy of the adapter at its start."""
    kind, config = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[objective]
    usual: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False,
        "activation_checkpointing": False, "max_length": 32, "disable_dropout": True,
    }  # fmt: skip
    return kind(
        copy.deepcopy(tuned.model),
        args=config(**usual | changes),
        train_dataset=Dataset.from_list(list(ROWS[objective])),
        processing_class=tuned.tokenizer,
    )


@pytest.mark.parametrize(
    ("objective", "changes", "theirs"),
    [
        ("dpo", {"beta": 0.1}, {"beta": 0.1}),
        ("dpo", {"beta": 0.7}, {"beta": 0.7}),
        ("kto", {"beta": 0.3} | WEIGHTS, {"beta": 0.3, "loss_type": "apo_zero_unpaired"} | WEIGHTS),
    ],
)
def test_loss_and_gradients_are_trls(models, tmp_path, objective, changes, theirs):
    tuned, encoded = prepared(plan_of(models["llama"], objective, **changes))
    trainer = trl(tmp_path, tuned, objective, **theirs)
    shake(tuned.model)
    shake(trainer.model)
    ours = losses(tuned.model, encoded).mean()
    examples = [trainer.train_dataset[i] for i in range(len(ROWS[objective]))]
    peers = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    assert float(ours.detach()) == pytest.approx(float(peers.detach()), abs=1e-5)
    ours.backward()  # type: ignore[no-untyped-call]  # torch's has no annotations
    peers.backward()
    twins = trainable(trainer.model)
    for name, parameter in trainable(tuned.model).items():
        torch.testing.assert_close(parameter.grad, twins[name].grad, atol=1e-5, rtol=1e-4)
    # The control: another strength is another loss.
    other = dataclasses.replace(encoded, beta=1.1 * changes["beta"])
    assert abs(float((losses(tuned.model, other).mean() - peers).detach())) > 1e-4


def test_what_kto_leaves_out_is_what_couples_trls_records(models, tmp_path):
    """TRL's reference point is a mean over the batch: one record changes the loss of another."""
    tuned, encoded = prepared(plan_of(models["llama"], "kto", beta=1.0))
    trainer = trl(tmp_path, tuned, "kto", beta=1.0, per_device_train_batch_size=4)
    for model in (tuned.model, trainer.model):  # where answers are likelier than at the start
        shake(model)
        optimizer = torch.optim.SGD(list(trainable(model).values()), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (-scores(model, collate(encoded, range(4), "cpu")).mean()).backward()  # type: ignore[no-untyped-call]  # torch
            optimizer.step()
    rows = [trainer.train_dataset[i] for i in range(4)]

    def theirs(chosen: list[int]) -> float:
        batch = trainer.data_collator([rows[i] for i in chosen])
        return float(trainer.compute_loss(trainer.model, batch).detach()) * len(chosen)

    def ours(chosen: list[int]) -> float:
        return float(losses(tuned.model, encoded, chosen).detach().sum())

    def coupling(total: Callable[[list[int]], float]) -> float:
        return abs(total([0, 1, 2, 3]) - total([0, 2]) - total([1, 3]))

    assert coupling(ours) < 1e-5
    assert coupling(theirs) > 1e-3


@both
def test_the_start_is_the_reference_and_every_loss_that_of_no_preference(models, objective):
    tuned, encoded = prepared(plan_of(models["llama"], objective))
    with torch.no_grad():
        start = losses(tuned.model, encoded)
    none = math.log(2) if objective == "dpo" else 0.5
    torch.testing.assert_close(start, torch.full_like(start, none), atol=1e-5, rtol=0)


@both
def test_the_reference_stays_wherever_the_adapter_is(models, objective):
    plan = plan_of(models["llama"], objective)
    tuned, encoded = prepared(plan)
    shake(tuned.model)
    before = [p.detach().clone() for p in trainable(tuned.model).values()]
    rows = group(ROWS[objective], None)
    again = with_reference(tuned, encode(rows, tuned.tokenizer, plan))
    assert [e.reference for e in again.examples] == [e.reference for e in encoded.examples]
    for one, other in zip(before, trainable(tuned.model).values(), strict=True):
        assert torch.equal(one, other), "the adapter came back"
    moved = referred(tuned.model, encoded)
    assert [e.reference for e in moved.examples] != [e.reference for e in encoded.examples]


@both
def test_a_loss_depends_on_its_record_alone(models, objective):
    tuned, encoded = prepared(plan_of(models["llama"], objective))
    shake(tuned.model)
    with torch.no_grad():
        together = losses(tuned.model, encoded)
        alone = [losses(tuned.model, encoded, [i])[0] for i in range(len(together))]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


@both
def test_a_reference_depends_on_its_record_alone(models, objective):
    tuned, together = prepared(plan_of(models["llama"], objective))
    known = [example.reference for example in together.examples]
    for example, reference in zip(together.examples, known, strict=True):
        one = with_reference(tuned, dataclasses.replace(together, examples=(example,)))
        assert one.examples[0].reference == pytest.approx(reference, abs=1e-4)
    assert max(known) - min(known) > 0.1, "the control: they are not all alike"


@both
def test_records_without_an_answer_and_far_too_long_ones_do_not_end_a_training(models, objective):
    """An error would tell of the patient whose record it is."""
    plan = plan_of(models["llama"], objective)
    rows = [
        {"prompt": p, "chosen": a, "rejected": b, "completion": a, "label": True}
        for p, a, b in (("", "", ""), ("Any?", " No.", " No."), ("so " * 99, "yes " * 99, ""))
    ]
    tuned = tuned_model(plan)
    load_adapter(tuned.model, from_bytes(tuned.start))
    encoded = encode(group(rows, None), tuned.tokenizer, plan)
    assert max(len(example.tokens) for example in encoded.examples) == plan.task.max_length
    encoded = with_reference(tuned, encoded)
    for units in ([[0]], [[1]], [[2]], [[0], [1, 2]]):
        _, facts = released(
            tuned.model,
            lambda model, found: loss_per_example(model, collate(encoded, found, "cpu")),
            units=units,
        )
        assert (facts.units, facts.non_finite) == (len(units), 0)


def test_accuracy_is_the_share_of_pairs_whose_better_answer_is_likelier(models):
    tuned, encoded = prepared(plan_of(models["llama"], "dpo"))
    batch = collate(encoded, range(5), "cpu")
    with torch.no_grad():
        wanted = (scores(tuned.model.eval(), batch) > 0).double()
    found = evaluate(tuned.model, encoded)
    assert found.correct is not None and found.accuracy is not None
    assert found.correct.tolist() == wanted.tolist()
    assert found.accuracy == float(wanted.mean())
    turned = [
        dataclasses.replace(e.rejected, rejected=dataclasses.replace(e, rejected=None))
        for e in encoded.examples
        if e.rejected is not None
    ]
    other = evaluate(tuned.model, dataclasses.replace(encoded, examples=tuple(turned)))
    assert other.accuracy == pytest.approx(1 - found.accuracy)


def test_accuracy_of_single_answers_is_whether_they_moved_as_their_label_says(models):
    tuned, encoded = prepared(plan_of(models["llama"], "kto"))
    shake(tuned.model)
    with torch.no_grad():
        batch = collate(encoded, range(10), "cpu")
        rose = scores(tuned.model.eval(), batch) > batch["reference"]
    wanted = [bool(up) == row["label"] for up, row in zip(rose, SINGLE, strict=True)]
    assert evaluate(tuned.model, encoded).accuracy == pytest.approx(sum(wanted) / 10)


@pytest.mark.parametrize("value", [True, False, "true", "False", 1, "0"])
def test_a_label_of_kto_is_true_or_false(models, tmp_path, value):
    plan = plan_of(models["llama"], "kto", **WEIGHTS)
    folder = write_data(tmp_path / "data", [SINGLE[0] | {"label": value}])
    records = read_records(folder / "train.jsonl", plan)
    (example,) = encode(records, tuned_model(plan).tokenizer, plan).examples
    assert example.weight == (1.5 if value in (True, "true", 1) else -0.5)


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("kto", {"label": "maybe"}, "'label' must hold true or false"),
        ("kto", {"label": [1]}, "'label' must hold true or false"),
        ("kto", {"completion": None}, "'completion' must hold text"),
        ("dpo", {"chosen": 1}, "'chosen' must hold text"),
        ("dpo", {"rejected": None}, "'rejected' must hold text"),
        ("dpo", {"prompt": None}, "'prompt' must hold text"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(models, tmp_path, objective, row, message):
    plan = plan_of(models["llama"], objective)
    folder = write_data(tmp_path / "data", [ROWS[objective][0] | row])
    with pytest.raises(DataError, match=message):
        read_records(folder / "train.jsonl", plan)
