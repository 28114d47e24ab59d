"""What a session is about (``P`` of R0), and what a site's own policy makes of it."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.transcript import PROTOCOL
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import ConfigurationError, InvalidValue, ProtocolError
from fedward.identity import Roster

_LIMIT = 1 << 16  # bytes of P
_HASH_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Slot:
    """An extra word of the vector: a noised metric, never sent beside it.

    Args:
        name: 1 to 64 of a-z, 0-9, '-' and '_'.
        clip: The value is clipped to ±clip, 1e-30 to 1e30; fixes its own grid.
    """

    name: str
    clip: float

    def __post_init__(self) -> None:
        """Check every limit."""
        if re.fullmatch(r"[a-z0-9_-]{1,64}", self.name) is None:
            raise InvalidValue("slot", self.name, "1 to 64 of a-z, 0-9, '-' and '_'")
        if not 1e-30 <= self.clip <= 1e30:
            raise InvalidValue(f"slot {self.name} clip", self.clip, "1e-30 to 1e30")


@dataclass(frozen=True, kw_only=True)
class SessionParameters:
    """Everything public that a session binds. Coordinator and sites build it alike, from the plan.

    Args:
        attempt: Run, round, session, attempt.
        roster_hash: :meth:`fedward.identity.Roster.hash` of the pinned roster, 32 bytes.
        task_hash: :func:`fedward.aggregation.transcript.task_hash`, 32 bytes.
        dimension: Coordinates of an update, 0 to 2^34.
        grid: The fixed-point grid of the update; its ``sites`` caps the cohort.
        slots: Extra words behind the update, at most 64, names unique.
        colluders: ``T``: sites that may work together with the coordinator, 0 or more.
        dropouts: ``D``: sites expected to vanish; only the ring's degree depends on it.
        minimum: ``U_min``: fewest sites in the sum, at least max(3, T + 2), at most grid.sites.
        noise: Standard deviation of each site's share of distributed noise, in the unit of the
            update; 0 where the guarantee stands without one.
        deadline: Seconds that one exchange may take, 1 to 2^31 - 1.
        weights: Each site of the roster with its weight in the mean, ascending by id, at most
            1,024; empty: all weigh alike. Public constants of the plan, never a number of patients.
        rotated: Whether updates are rotated before they are rounded
            (:mod:`fedward.aggregation.rotation`); 16-bit words need it.
        group: The only sites that may be in the sum, ascending. Empty: all of the roster.
        cohort: The sites that must be in the sum, all of them and no others, ascending: of a second
            pass the survivors of the first, and then the minimum is their number. Empty: whoever
            comes.
    """

    attempt: Attempt
    roster_hash: bytes
    task_hash: bytes
    dimension: int
    grid: Grid
    slots: tuple[Slot, ...] = ()
    colluders: int
    dropouts: int = 0
    minimum: int
    noise: float = 0.0
    deadline: int = 3600
    weights: tuple[tuple[int, float], ...] = ()
    rotated: bool = False
    group: tuple[int, ...] = ()
    cohort: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every limit."""
        lowest = max(3, self.colluders + 2)
        names = [slot.name for slot in self.slots]
        ids = [site for site, _ in self.weights]
        known = all(type(site) is int and 0 <= site < 2**32 for site in ids)
        weighed = all(1e-9 <= weight <= 1e9 for _, weight in self.weights)
        checks: tuple[tuple[str, object, bool, str], ...] = (
            ("roster_hash", self.roster_hash, len(self.roster_hash) == _HASH_BYTES, "32 bytes"),
            ("task_hash", self.task_hash, len(self.task_hash) == _HASH_BYTES, "32 bytes"),
            ("dimension", self.dimension, 0 <= self.dimension <= 1 << 34, "0 to 2^34"),
            ("slots", names, len(set(names)) == len(names) <= 64, "at most 64, names unique"),
            ("colluders", self.colluders, self.colluders >= 0, "0 or more"),
            ("dropouts", self.dropouts, 0 <= self.dropouts <= self.grid.sites, "0 to sites"),
            (
                "minimum",
                self.minimum,
                # With a sum of T + 1 sites or fewer, the colluders take their own inputs away and
                # read the rest: one site's update.
                lowest <= self.minimum <= self.grid.sites,
                f"{lowest} to {self.grid.sites} with {self.colluders} colluders",
            ),
            ("noise", self.noise, 0 <= self.noise < math.inf, "0 or more"),
            ("deadline", self.deadline, 1 <= self.deadline < 1 << 31, "1 to 2^31 - 1 seconds"),
            ("weights", ids, known and ids == sorted(set(ids)), "site ids, ascending"),
            ("weights", len(ids), len(ids) <= 1024, "at most 1024"),
            ("weights", self.weights, weighed, "1e-9 to 1e9 each"),
            ("group", self.group, _ascending(self.group), "site ids, ascending"),
            ("cohort", self.cohort, self._whole, "site ids, ascending, as many as the minimum"),
        )
        for key, value, holds, allowed in checks:
            if not holds:
                raise InvalidValue(key, value, allowed)

    @property
    def _whole(self) -> bool:
        return _ascending(self.cohort) and len(self.cohort) in {0, self.minimum}

    @property
    def allowed(self) -> tuple[int, ...]:
        """The only sites that may be in the cohort; empty: all of the roster."""
        return self.cohort or self.group

    @property
    def reserved(self) -> Attempt:
        """The attempt whose reservation pays for the input: a second pass has the first one's."""
        if not self.cohort:
            return self.attempt
        return dataclasses.replace(self.attempt, session=self.attempt.session - 1)

    @property
    def words(self) -> int:
        """``d``: words of a masked vector, the slots' included."""
        return self.dimension + len(self.slots)

    def share(self, site: int) -> float:
        """The factor of a site's update before it is summed: its weight over the heaviest, <= 1.

        Raises:
            ProtocolError: Updates are weighed, and this site has no weight.
        """
        if not self.weights:
            return 1.0
        weights = dict(self.weights)
        if site not in weights:
            raise ProtocolError(f"the session has no weight for site {site}")
        return weights[site] / max(weights.values())

    def divisor(self, cohort: Iterable[int]) -> float:
        """What the sum over a cohort is divided by to give the mean: the sum of their shares."""
        return math.fsum(self.share(site) for site in cohort)

    def fields(self) -> dict[str, Any]:
        """The fields of ``P``: integers and strings only, reals as hexadecimal floats."""
        return {
            "proto": PROTOCOL,
            "run": self.attempt.run,
            "round": self.attempt.round,
            "session": self.attempt.session,
            "attempt": self.attempt.attempt,
            "roster_hash": self.roster_hash.hex(),
            "task_hash": self.task_hash.hex(),
            "words": self.words,
            "word_bits": self.grid.word_bits,
            "bits": self.grid.bits,
            "gamma": float(self.grid.gamma).hex(),
            "clip": float(self.grid.clip).hex(),
            "sites": self.grid.sites,
            "weights": [[site, float(w).hex()] for site, w in self.weights] or "uniform",
            "rotated": int(self.rotated),
            "slots": [[slot.name, float(slot.clip).hex()] for slot in self.slots],
            "colluders": self.colluders,
            "dropouts": self.dropouts,
            "minimum": self.minimum,
            "noise": float(self.noise).hex(),
            "deadline": self.deadline,
            **({"group": list(self.group)} if self.group else {}),
            **({"cohort": list(self.cohort)} if self.cohort else {}),
        }

    def difference(self, other: bytes) -> str:
        """Name the parameters of another ``P`` that are not these; they are public.

        Raises:
            ProtocolError: As of :meth:`from_bytes`.
        """
        ours, theirs = self.fields(), self.from_bytes(other).fields()
        names = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        return "; ".join(f"{key} = {theirs.get(key)!r}, not {ours.get(key)!r}" for key in names)

    def to_bytes(self) -> bytes:
        """``P``: canonical JSON of :meth:`fields`."""
        return canonical_json(self.fields())

    @classmethod
    def from_bytes(cls, data: bytes) -> "SessionParameters":
        """Read ``P`` strictly: only the bytes that :meth:`to_bytes` writes are accepted.

        Raises:
            ProtocolError: Too long, malformed, out of range, or not canonical.
        """
        if len(data) > _LIMIT:
            raise ProtocolError(f"parameters have {len(data)} bytes, at most {_LIMIT}")
        try:
            fields = json.loads(data)
            parsed = _build(_typed(fields))
            canonical = parsed.to_bytes() == data  # raises where a text holds half a surrogate pair
        except _MALFORMED as error:
            raise ProtocolError("the session's parameters are malformed") from error
        if not canonical:
            raise ProtocolError("the session's parameters are not in canonical form")
        return parsed


_MALFORMED = (ValueError, OverflowError, KeyError, TypeError, RecursionError, ConfigurationError)

_TEXT = ("proto", "run", "roster_hash", "task_hash", "gamma", "clip", "noise")


def _typed(fields: Any) -> Mapping[str, Any]:  # noqa: ANN401  # JSON before its types are checked
    """Refuse other types than P has: True is an int to Python, and 1.0 equals 1."""
    for name, value in dict(fields).items():
        kind = list if name in {"slots", "group", "cohort"} else str if name in _TEXT else int
        if name == "weights":
            kind = str if value == "uniform" else list
        if type(value) is not kind:
            raise TypeError(f"{name} is not of type {kind.__name__}")
    return dict(fields)


def _build(fields: Mapping[str, Any]) -> SessionParameters:
    slots = tuple(Slot(name=name, clip=float.fromhex(clip)) for name, clip in fields["slots"])
    return SessionParameters(
        attempt=Attempt(
            run=fields["run"],
            round=fields["round"],
            session=fields["session"],
            attempt=fields["attempt"],
        ),
        roster_hash=bytes.fromhex(fields["roster_hash"]),
        task_hash=bytes.fromhex(fields["task_hash"]),
        dimension=fields["words"] - len(slots),
        grid=Grid(
            clip=float.fromhex(fields["clip"]),
            sites=fields["sites"],
            word_bits=fields["word_bits"],
        ),
        slots=slots,
        colluders=fields["colluders"],
        dropouts=fields["dropouts"],
        minimum=fields["minimum"],
        noise=float.fromhex(fields["noise"]),
        deadline=fields["deadline"],
        weights=_weights(fields["weights"]),
        rotated=bool(fields["rotated"]),
        group=tuple(fields.get("group", ())),
        cohort=tuple(fields.get("cohort", ())),
    )


def _ascending(sites: tuple[int, ...]) -> bool:
    ids = all(type(site) is int and 0 <= site < 2**32 for site in sites)
    return ids and sites == tuple(sorted(set(sites)))


def _weights(value: Any) -> tuple[tuple[int, float], ...]:  # noqa: ANN401  # JSON
    pairs = () if value == "uniform" else value
    return tuple((site, float.fromhex(weight)) for site, weight in pairs)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site's own policy demands of every session.

    Args:
        colluders: Fewest colluding sites that a session must withstand, 0 or more.
        minimum: Fewest sites in a sum, 3 or more.
        sites: Most sites in a cohort; more widen the grid's steps and the site's work.
        words: Most words of a vector; bounds the site's memory.
        one_sum: Whether the roster must not be split into two sums at the same time; then the
            minimum must be above (roster + colluders) / 2.
    """

    colluders: int = 0
    minimum: int = 3
    sites: int = 1024
    words: int = 1 << 30
    one_sum: bool = False

    def __post_init__(self) -> None:
        """Check every limit."""
        for key, value, low in (
            ("colluders", self.colluders, 0),
            ("minimum", self.minimum, 3),
            ("sites", self.sites, 3),
            ("words", self.words, 1),
        ):
            if value < low:
                raise InvalidValue(key, value, f"at least {low}")

    def check(self, parameters: SessionParameters, roster: Roster) -> None:
        """Compare a session with every limit.

        Raises:
            ProtocolError: With every reason at once.
        """
        reasons = list(self._reasons(parameters, roster))
        if reasons:
            raise ProtocolError("the site's limits refuse this session: " + "; ".join(reasons))

    def _reasons(self, parameters: SessionParameters, roster: Roster) -> Iterator[str]:
        p = parameters
        if p.colluders < self.colluders:
            yield f"colluders {p.colluders} are below {self.colluders}"
        if p.minimum < self.minimum:
            yield f"minimum {p.minimum} is below {self.minimum}"
        if p.grid.sites > self.sites:
            yield f"{p.grid.sites} sites are above {self.sites}"
        if p.words > self.words:
            yield f"{p.words} words are above {self.words}"
        if self.one_sum and 2 * p.minimum <= len(roster.members) + p.colluders:
            yield f"minimum {p.minimum} would let {len(roster.members)} sites be split in two sums"
