"""Ways to lose the guarantee, planted one at a time, and which layer of the audit sees each.

Every bug is a subclass or a wrong loss, put where the engine would have it; the product has no
switch for any of them. A is the search for sensitivity, B the attack on releases; neither finds all
of them alone, and neither says anything against the right engine.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]  # no py.typed
from torch import Tensor

from fedward.privacy import training
from fedward.privacy.accounting import noise_multiplier
from fedward.privacy.audit_bound import ReleaseBound, attack_releases
from fedward.privacy.audit_sensitivity import (
    Loss,
    Neighbours,
    Sensitivity,
    micro_loss,
    micro_pairs,
    releases,
    search,
)
from fedward.privacy.noise import SecureStream
from fedward.privacy.optimizer import Mechanism, UnitOptimizer

KEY = bytes(range(32))
DELTA = 1e-5
CONFIDENCE = 0.999
CLAIM = Mechanism(
    sampling_rate=1.0,
    normaliser=4.0,
    clip=0.5,
    noise_multiplier=noise_multiplier(epsilon=2.0, delta=DELTA, sampling_rate=1.0, steps=1),
    records_per_unit=3,
)
"""Everybody takes part in one step, which claims epsilon 2."""
DRAWN = Mechanism(
    sampling_rate=0.25, normaliser=4.0, clip=0.5, noise_multiplier=2.0, records_per_unit=3
)
"""One in four takes part."""

Patch = pytest.MonkeyPatch


def planted(patch: Patch, **methods: Any) -> None:
    """Train with an optimizer that has these wrong methods."""
    patch.setattr(training, "UnitOptimizer", type("Wrong", (UnitOptimizer,), methods))


def whole_batch(patch: Patch) -> None:
    """What prompt tuning does to Opacus: the batch is clipped as if it were one unit."""

    def whole(self: Any, groups: list[int] | None = None) -> None:
        UnitOptimizer.clip_and_accumulate(self, [0] * len(groups or []))

    planted(patch, clip_and_accumulate=whole)


def one_parameter(patch: Patch) -> None:
    """The first parameter's gradients are summed, but not clipped."""

    def forgets(self: Any, groups: Any = None) -> None:
        first = self._units[0]
        kept, first.grad_sample = first.grad_sample, None
        UnitOptimizer.clip_and_accumulate(self, groups)
        if kept is not None:
            first.summed_grad = kept.sum(0)

    planted(patch, clip_and_accumulate=forgets)


def each_parameter(patch: Patch) -> None:
    """Every parameter is clipped by itself: together they may be longer."""

    def each(self: Any, groups: Any = None) -> None:
        kept = [(p, p.grad_sample) for p in self._units]
        for parameter, rows in kept:
            for other, _ in kept:
                other.grad_sample = rows if other is parameter else None
            UnitOptimizer.clip_and_accumulate(self, groups)

    planted(patch, clip_and_accumulate=each)


def each_record(patch: Patch) -> None:
    """A patient's records are clipped one by one, so that many of them move the sum by more."""

    def by_record(self: Any, groups: Any = None) -> None:
        UnitOptimizer.clip_and_accumulate(self, None)

    planted(patch, clip_and_accumulate=by_record)


def actual_batch(patch: Patch) -> None:
    """The sum is divided by how many were drawn."""

    def actual(self: Any) -> None:
        for parameter in self._units:
            parameter.grad /= max(1, self.units)
        self.units = 0

    planted(patch, scale_grad=actual)


def never_empty(patch: Patch) -> None:
    """An empty draw is filled with somebody."""
    draw = training.draw
    patch.setattr(training, "draw", lambda units, *rest: draw(units, *rest) or [[0]])


def skipped_step(patch: Patch) -> None:
    """An empty draw releases nothing."""

    def skips(self: Any, closure: Any = None) -> Any:
        units, self.units = self.units, 0
        return UnitOptimizer.step(self, closure) if units else None

    planted(patch, step=skips)


def less_noise(share: float) -> Callable[[Patch], None]:
    """Only a share of the noise is added."""

    def plant(patch: Patch) -> None:
        def less(self: Any) -> None:
            self.noise_multiplier *= share
            UnitOptimizer.add_noise(self)
            self.noise_multiplier /= share

        planted(patch, add_noise=less)

    return plant


def no_noise(patch: Patch) -> None:
    """None is added."""

    def none(self: Any) -> None:
        self.noise_multiplier = 0.0
        UnitOptimizer.add_noise(self)

    planted(patch, add_noise=none)


def fixed_seed(patch: Patch) -> None:
    """Every step draws the same noise."""

    def fixed(self: Any) -> None:
        self._stream = SecureStream(KEY)
        UnitOptimizer.add_noise(self)

    planted(patch, add_noise=fixed)


def everybody(patch: Patch) -> None:
    """Nobody is sampled: everybody takes part in every step."""
    patch.setattr(training, "draw", lambda units, *_: [list(unit) for unit in units])


def batch_mean(data: Tensor, labels: Tensor) -> Loss:
    """The loss of transformers: divided by the tokens of the batch, so that records couple."""
    tokens = data.norm(dim=1)

    def loss(model: Any, rows: Any) -> Tensor:
        weights = tokens[list(rows)]
        losses: Tensor = micro_loss(data, labels)(model, rows)
        share: Tensor = weights / weights.sum() * len(rows)
        return losses * share

    return loss


def layer_a(mechanism: Mechanism, loss_of: Any = micro_loss) -> list[Sensitivity]:
    """The worst neighbours that are alone, and those in company."""
    pairs = list(micro_pairs(mechanism, loss_of))
    return [
        search([pair for pair in pairs if bool(pair.units) == others], mechanism)
        for others in (False, True)
    ]


def layer_b(
    found: list[Sensitivity], mechanism: Mechanism, *, count: int = 400, key: bytes = KEY
) -> Iterator[ReleaseBound]:
    """Attacks on them; where not everybody is drawn, only on those alone."""
    for worst in found if mechanism.sampling_rate == 1 else found[:1]:
        yield attack_releases(
            worst.pair,
            mechanism,
            delta=DELTA,
            confidence=CONFIDENCE,
            count=count,
            stream=SecureStream(key),
        )


BUGS = {
    "clip the whole batch": (whole_batch, CLAIM, micro_loss, "AB"),
    "batch-token-mean loss": (lambda _: None, CLAIM, batch_mean, "AB"),
    "one parameter not clipped": (one_parameter, CLAIM, micro_loss, "AB"),
    "per-parameter clip": (each_parameter, CLAIM, micro_loss, "A"),
    "per-record clip": (each_record, CLAIM, micro_loss, "AB"),
    "divide by the actual batch": (actual_batch, CLAIM, micro_loss, "AB"),
    "fill an empty draw": (never_empty, CLAIM, micro_loss, "AB"),
    "skip the empty step": (skipped_step, CLAIM, micro_loss, "AB"),
    "half noise": (less_noise(0.5), CLAIM, micro_loss, "B"),
    "noise over the root of the batch": (less_noise(1 / 8**0.5), CLAIM, micro_loss, "B"),
    "fixed seed": (fixed_seed, CLAIM, micro_loss, "B"),
    "no noise": (no_noise, CLAIM, micro_loss, "B"),
    "no Poisson sampling": (everybody, DRAWN, micro_loss, "B"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(monkeypatch, bug):
    plant, mechanism, loss_of, expected = BUGS[bug]
    plant(monkeypatch)
    found = layer_a(mechanism, loss_of)
    assert all(worst.holds for worst in found) == ("A" not in expected)
    if "B" in expected:
        assert any(not attack.holds for attack in layer_b(found, mechanism))


@pytest.mark.parametrize("mechanism", [CLAIM, DRAWN], ids=["everybody", "drawn"])
@pytest.mark.parametrize("clip", [0.05, 0.5, 10.0])
def test_the_right_engine_passes_the_search(mechanism, clip):
    alone, company = layer_a(dataclasses.replace(mechanism, clip=clip))
    assert (alone.tried, company.tried) == (18, 54)
    assert 0.9999 < min(alone.clips, company.clips) <= max(alone.clips, company.clips) <= 1.0001


def test_the_right_engine_withstands_the_attack_where_some_are_drawn():
    for attack in layer_b(layer_a(DRAWN), DRAWN):
        assert attack.holds


def test_the_bound_of_the_right_engine_is_at_least_half_of_the_claim():
    alone, _ = layer_a(CLAIM)
    (attack,) = layer_b([alone], CLAIM, count=2000)
    assert attack.claim == pytest.approx(2.0, abs=1e-3)
    assert 1.0 <= attack.lower <= attack.claim
    assert attack.repeated == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
def test_with_more_releases_the_bound_comes_closer(number):
    """At any key: what the fixed one shows is not luck."""
    key = bytes([number]) * 32
    for attack in layer_b(layer_a(CLAIM), CLAIM, count=10_000, key=key):
        assert 1.4 <= attack.lower <= attack.claim
    for attack in layer_b(layer_a(DRAWN), DRAWN, count=10_000, key=key):
        assert attack.holds


def test_without_noise_the_bound_is_above_three(monkeypatch):
    no_noise(monkeypatch)
    for attack in layer_b(layer_a(CLAIM), CLAIM):
        assert attack.lower >= 3
        assert attack.repeated > 0


def test_the_noise_has_the_scale_that_is_claimed():
    pair = Neighbours(name="", model=torch.nn.Linear(50, 50), loss=_nobody, units=(), canary=())
    rows = releases(pair, CLAIM, canary=False, steps=4, stream=SecureStream(KEY)).double()
    deviation = CLAIM.noise_multiplier * CLAIM.clip / CLAIM.normaliser

    def fits(deviation: float) -> bool:
        chance = stats.chi2.cdf(float((rows / deviation).square().sum()), rows.numel())
        return 0.0005 < float(chance) < 0.9995

    assert fits(deviation)
    assert not fits(deviation * 1.06)
    assert not fits(deviation / 1.06)


def _nobody(model: Any, rows: Any) -> Tensor:
    raise AssertionError("nobody was to be drawn")
