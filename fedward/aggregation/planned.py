"""The session that a plan implies: coordinator and sites derive the same parameters from it."""

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.parameters import SessionParameters, Slot
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.rotation import rotated_grid
from fedward.aggregation.shared_noise import noisy_grid
from fedward.aggregation.two_pass import clip_of_second
from fedward.attempt import Attempt
from fedward.errors import InvalidValue
from fedward.identity import Roster
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation
from fedward.privacy.accounting import Event
from fedward.privacy.planned import training_event
from fedward.privacy.pooled import coarsest_step, noise_share, pooled_event

METRIC_SLOTS = ("loss", "correct", "units")
"""The extra words of a plan with ``[metrics]``, in order."""

_METRIC_CLIP = float(1 << 20)  # a site's sum over held-out units; a public constant


def planned_session(
    plan: Plan,
    roster: Roster,
    attempt: Attempt,
    *,
    task_hash: bytes,
    dimension: int,
    group: tuple[int, ...] = (),
    cohort: tuple[int, ...] = (),
) -> SessionParameters:
    """The parameters of a session of this plan.

    Args:
        plan: The frozen plan.
        roster: The pinned roster; who is asked of it are the most sites that a sum can have.
        attempt: Run, round, session, attempt.
        task_hash: What the updates start from, 32 bytes.
        dimension: Coordinates of an update.
        group: Of a plan with groups: the one that the session is of. Without them, the sites that
            the attempt's draw asks are the group of a plan with participants.
        cohort: In a second pass the survivors of the first; metrics have been in that one's sum.

    Raises:
        InvalidValue: The plan's cohort, participants, word size, weights or ranks do not fit the
            roster.
    """
    asked = asked_sites(plan, roster, attempt)
    sites = len(group or asked)
    if plan.rounds.participants is not None and not cohort:
        group = group or asked
    aggregation, metrics = plan.aggregation, plan.metrics
    if plan.cohort.minimum > sites:
        raise InvalidValue("minimum", plan.cohort.minimum, f"at most the {sites} sites there are")
    unknown = set(plan.tuner.ranks or ()) - {member.name for member in roster.members}
    if unknown:
        raise InvalidValue("ranks", sorted(unknown), "names of sites in the roster")
    noise = noise_share(plan, dimension) if plan.mode == "pooled" else 0.0
    names = METRIC_SLOTS if metrics and not cohort else ()
    return SessionParameters(
        attempt=attempt,
        roster_hash=roster.hash(),
        task_hash=task_hash,
        dimension=dimension,
        grid=_grid(plan, dimension, sites, noise, again=bool(cohort)),
        slots=tuple(Slot(name=n, clip=_METRIC_CLIP) for n in names),
        colluders=plan.cohort.colluders,
        dropouts=sites // 10,
        minimum=len(cohort) or plan.cohort.minimum,
        noise=noise,
        deadline=plan.rounds.deadline_seconds,
        weights=_weights(aggregation, roster),
        rotated=aggregation.word_bits == 16,
        group=group,
        cohort=cohort,
    )


def update_event(plan: Plan, parameters: SessionParameters) -> Event:
    """What one round's update costs a unit, for the site's ledger."""
    if plan.mode == "local" or not plan.privacy.enabled:
        return training_event(plan)
    return pooled_event(plan, parameters.dimension)


def _grid(plan: Plan, dimension: int, sites: int, noise: float, *, again: bool) -> Grid:
    """16-bit words are fine enough only for updates that a rotation has spread."""
    aggregation = plan.aggregation
    clip = clip_of_second(aggregation.update_clip) if again else aggregation.update_clip
    if noise > 0:
        grid = noisy_grid(aggregation.update_clip, share=noise, sites=sites)
        finest = coarsest_step(plan, dimension)
        if grid.gamma > finest:
            most = finest * grid.steps
            raise InvalidValue("update_clip", aggregation.update_clip, f"at most {most:.3g}")
        return grid
    if aggregation.word_bits == 16:
        return rotated_grid(clip, dimension, sites=sites)
    return Grid(clip=clip, sites=sites, word_bits=32)


def _weights(aggregation: Aggregation, roster: Roster) -> tuple[tuple[int, float], ...]:
    weights = aggregation.weights
    if weights is None:
        return ()
    missing = [member.name for member in roster.members if member.name not in weights]
    if missing:
        raise InvalidValue("weights", sorted(weights), f"also one for {missing[0]!r}")
    return tuple((member.id, weights[member.name]) for member in roster.members)
