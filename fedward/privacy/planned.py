"""What the rounds of a plan cost: events that site, coordinator and command line compute alike."""

from fedward.plan import Plan
from fedward.privacy.accounting import SampledGaussian, noise_multiplier


def training_event(plan: Plan) -> SampledGaussian:
    """What one round's training costs a unit at a site."""
    rounds, privacy = plan.rounds, plan.privacy
    sigma = 0.0
    if privacy.enabled:
        sigma = noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=rounds.sampling_rate,
            steps=(rounds.count + rounds.spare) * rounds.steps,
        )
    return SampledGaussian(
        noise_multiplier=sigma, sampling_rate=rounds.sampling_rate, steps=rounds.steps
    )


def metric_event(plan: Plan) -> SampledGaussian | None:
    """What one round's metrics cost a held-out unit; None where the plan asks for none."""
    if plan.metrics is None:
        return None
    rounds = plan.rounds.count + plan.rounds.spare
    sigma = 0.0
    if plan.privacy.enabled:
        sigma = noise_multiplier(
            epsilon=plan.metrics.epsilon,
            delta=plan.privacy.delta,
            sampling_rate=1.0,
            steps=rounds,
        )
    return SampledGaussian(noise_multiplier=sigma, sampling_rate=1.0, steps=1)
