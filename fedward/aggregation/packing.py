"""One site's update and metric slots as the words of a session, and a sum of them back."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedward.aggregation.fixed_point import Grid, decode, encode
from fedward.aggregation.masks import Words
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.rotation import rotate, rotate_back
from fedward.aggregation.two_pass import clip_of_second
from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import ProtocolError
from fedward.privacy.noise import SecureStream


class SumTooLong(ProtocolError):
    """Some site of the cohort sent more than the plan allows; the sum does not tell which.

    Args:
        cohort: The sites in the sum.
    """

    def __init__(self, cohort: Sequence[int]) -> None:
        named = ", ".join(map(str, cohort))
        super().__init__(
            "the published sum is longer than its sites' updates can be: "
            f"at least one of the sites {named} sent too much"
        )
        self.cohort = tuple(cohort)


def pack(
    update: npt.NDArray[np.floating],
    slots: npt.NDArray[np.float64],
    parameters: SessionParameters,
    stream: SecureStream,
) -> Words:
    """Encode an update and its slots, each slot on its own grid.

    Metrics travel behind the update inside the masked vector: beside it, they would tell the
    coordinator something about this one site.

    Args:
        update: ``(dimension,)``, clipped to the plan's ``update_clip``.
        slots: One value a slot, in the parameters' order; clipped to the slot's own bound.
        parameters: The session's parameters.
        stream: Fresh cryptographic randomness for rounding.

    Returns:
        ``(words,)``: what :meth:`SiteSession.masked` takes.

    Raises:
        ProtocolError: Another shape, NaN or infinity.
    """
    wanted = ((parameters.dimension,), (len(parameters.slots),))
    if (update.shape, slots.shape) != wanted:
        raise ProtocolError(
            f"expected an update and slots of shapes {wanted}, got {(update.shape, slots.shape)}"
        )
    words: Words = np.empty(parameters.words, dtype=parameters.grid.dtype)
    if parameters.rotated:
        update = rotate(update, _rotation_key(parameters.attempt))
    encode(update, parameters.grid, stream, out=words[: parameters.dimension])
    for place, grid in enumerate(_slot_grids(parameters)):
        word = slice(parameters.dimension + place, parameters.dimension + place + 1)
        encode(slots[place : place + 1], grid, stream, out=words[word])
    return words


def weighed(
    update: npt.NDArray[np.float32], parameters: SessionParameters, site: int
) -> npt.NDArray[np.floating]:
    """A site's update times its share of the heaviest weight: never longer than it was.

    Raises:
        ProtocolError: The session has weights, and none for this site.
    """
    share = parameters.share(site)
    return update if share == 1 else update.astype(np.float64) * share


def unpack(
    total: Words, parameters: SessionParameters
) -> tuple[npt.NDArray[np.float64], dict[str, float]]:
    """Decode a sum of packed vectors.

    Args:
        total: ``(words,)``: the sum.
        parameters: The session's parameters.

    Returns:
        The sum of the updates, ``(dimension,)``, and the sum of each slot by name.

    Raises:
        ProtocolError: Another length.
    """
    if total.shape != (parameters.words,):
        raise ProtocolError(f"expected {parameters.words} words, got shape {total.shape}")
    tail = total[parameters.dimension :]
    grids = _slot_grids(parameters)
    slots = {
        slot.name: float(decode(tail[place : place + 1], grids[place])[0])
        for place, slot in enumerate(parameters.slots)
    }
    update = decode(total[: parameters.dimension], parameters.grid)
    if parameters.rotated:
        update = rotate_back(update, _rotation_key(parameters.attempt))
    return update, slots


def check_mean(
    mean: npt.NDArray[np.float64],
    parameters: SessionParameters,
    cohort: Sequence[int],
    update_clip: float,
) -> None:
    """Check that a published mean is no longer than clipped, rounded, noised updates can make it.

    The coordinator checks before it commits a round, each site before it trains on.

    Args:
        mean: ``(dimension,)``: the sum over the session's divisor.
        parameters: The session's parameters.
        cohort: The sites in the sum.
        update_clip: The plan's L2 bound of an update.

    Raises:
        SumTooLong: It is longer.
    """
    if parameters.cohort:
        update_clip = clip_of_second(update_clip)
    rounding = len(cohort) * parameters.grid.gamma * math.sqrt(len(mean))
    # A Gaussian vector is longer than deviation * (sqrt(d) + 12) with a probability below 1e-31.
    noise = parameters.noise * math.sqrt(len(cohort)) * (math.sqrt(len(mean)) + 12)
    if float(np.linalg.norm(mean)) > update_clip + (rounding + noise) / parameters.divisor(cohort):
        raise SumTooLong(cohort)


def _rotation_key(attempt: Attempt) -> bytes:
    """Public, and another one in every session: what it clips by bad luck, the next does not."""
    numbers = (number.to_bytes(4, "big") for number in attempt.order)
    return digest("rotation", attempt.run.encode(), *numbers)


def _slot_grids(parameters: SessionParameters) -> list[Grid]:
    grid = parameters.grid
    return [
        Grid(clip=slot.clip, sites=grid.sites, word_bits=grid.word_bits)
        for slot in parameters.slots
    ]
