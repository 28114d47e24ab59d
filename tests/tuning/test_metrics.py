from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from fedward.errors import DataError
from fedward.plan import Task
from fedward.tuning.metrics import evaluate, paired_interval
from fedward.tuning.models import load_base
from fedward.tuning.objectives import Encoded, Example, collate, encode, loss_per_example
from fedward.tuning.records import group
from tests.tuning.rig import ROWS, make_plan


class Echo(nn.Module):
    """Says that an example's class is its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask):
        assert not self.training
        return SimpleNamespace(logits=4 * self.weight * torch.eye(5)[input_ids[:, 0]])


def classified(said: list[int], meant: list[int]) -> Encoded:
    examples = tuple(
        Example(tokens=(first,) * length, targets=(second,))
        for length, (first, second) in enumerate(zip(said, meant, strict=True), start=1)
    )
    return Encoded(examples=examples, padding=0, classify=True)


def test_the_figures_of_a_classifier():
    said, meant = [0, 1, 2, 2, 3, 1, 0], [0, 1, 1, 2, 3, 1, 3]
    model = Echo().train()
    found = evaluate(model, classified(said, meant), batch_size=3)
    assert model.training
    assert found.correct is not None
    assert found.correct.tolist() == [1, 1, 0, 1, 1, 1, 0]
    assert found.accuracy == pytest.approx(5 / 7)
    assert found.macro_f1 == pytest.approx(f1_score(meant, said, average="macro"))
    right = np.log(np.exp(4) + 4) - 4
    expected = np.where(found.correct == 1, right, right + 4)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.loss == pytest.approx(expected.mean())


def test_order_and_batches_do_not_matter_to_a_language_model(models):
    plan = make_plan(models["llama"], task=Task(max_length=32))
    base, tokenizer = load_base(plan.model, plan.task)
    examples = encode(group(ROWS, None), tokenizer, plan)
    found = evaluate(base, examples, batch_size=5)
    with torch.no_grad():
        alone = [float(loss_per_example(base, collate(examples, [i], "cpu"))) for i in range(24)]
    np.testing.assert_allclose(found.losses, alone, rtol=1e-4)
    assert found.correct is None
    assert found.accuracy is None


def test_nothing_to_evaluate_on():
    with pytest.raises(DataError, match="at least one"):
        evaluate(Echo(), classified([], []))


def test_a_mode_is_restored_after_a_failure():
    model = Echo().train()
    with pytest.raises(IndexError):
        evaluate(model, classified([7], [0]))
    assert model.training


class TestPairedInterval:
    def test_holds_the_true_difference_as_often_as_it_says(self):
        generator = np.random.default_rng(0)
        hits = 0
        for seed in range(200):
            base = generator.normal(size=80)
            other = base - 0.3 + generator.normal(size=80)
            _, low, high = paired_interval(base, other, seed=seed, resamples=300)
            hits += low <= 0.3 <= high
        assert 0.88 <= hits / 200 <= 0.99  # 0.95 and three standard errors, a little less at n = 80

    def test_pairs_find_what_unpaired_scores_hide(self):
        generator = np.random.default_rng(0)
        base = generator.normal(size=400) * 10
        other = base - 0.2 + generator.normal(size=400) * 0.1
        difference, low, high = paired_interval(base, other, seed=0)
        assert low < difference < high
        assert difference == pytest.approx(0.2, abs=0.02)
        assert low > 0.15
        _, low, high = paired_interval(base, generator.permutation(other), seed=0)
        assert low < 0 < high  # the control: pairs torn apart show nothing

    def test_the_seed_alone_decides(self):
        a, b = np.arange(20.0), np.ones(20)
        assert paired_interval(a, b, seed=1) == paired_interval(a, b, seed=1)
        assert paired_interval(a, b, seed=1) != paired_interval(a, b, seed=2)

    def test_other_lengths_are_refused(self):
        for first, second in ((np.ones(3), np.ones(2)), (np.ones(0), np.ones(0))):
            with pytest.raises(DataError):
                paired_interval(first, second)
