"""A whole session in memory: real sites, a real tally, and a say in who vanishes when."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.masks import Words
from fedward.aggregation.parameters import Limits, SessionParameters
from fedward.aggregation.published import SumResult
from fedward.aggregation.session_memory import VolatileMemory
from fedward.aggregation.site_session import SiteSession
from fedward.aggregation.tally import Tally
from fedward.attempt import Attempt
from fedward.identity import Identity, Member, Roster

STAGES = ("R0", "R1", "R2", "R3", "R4")


def identity(site: object) -> Identity:
    """The same key for a site in every test."""
    return Identity(hashlib.sha256(f"site {site}".encode()).digest())


def secrets_of(label: str) -> Callable[[int], bytes]:
    """A reproducible source of secret bytes."""
    count = iter(range(1 << 30))
    return lambda n: hashlib.shake_256(f"{label} {next(count)}".encode()).digest(n)


def make_roster(sites: Iterable[int], epoch: int = 1) -> Roster:
    members = tuple(
        Member(id=site, name=f"site {site}", public_key=identity(site).public_key)
        for site in sorted(sites)
    )
    return Roster(epoch=epoch, coordinator=identity("coordinator").public_key, members=members)


def make_parameters(roster: Roster, **changes: Any) -> SessionParameters:
    fields: dict[str, Any] = {
        "attempt": Attempt(run="run", round=1),
        "roster_hash": roster.hash(),
        "task_hash": bytes(32),
        "dimension": 10,
        "grid": Grid(clip=1.0, sites=max(3, len(roster.members)), word_bits=32),
        "colluders": 0,
        "dropouts": len(roster.members) // 10,
        "minimum": 3,
    }
    return SessionParameters(**{**fields, **changes})


def make_inputs(
    parameters: SessionParameters, sites: Iterable[int], seed: int = 0
) -> dict[int, Words]:
    generator = np.random.default_rng(seed)
    high = 1 << parameters.grid.word_bits
    return {
        site: generator.integers(0, high, parameters.words, dtype=parameters.grid.dtype)
        for site in sorted(sites)
    }


@dataclass
class Rig:
    """Sites and tally of one session.

    ``gone[site]`` is the first exchange in which a site no longer answers; ``order`` permutes
    arrivals; ``heard`` and ``said`` keep every message by stage and site.
    """

    sites: tuple[int, ...]
    parameters: SessionParameters
    roster: Roster
    inputs: dict[int, Words]
    gone: dict[int, str] = field(default_factory=dict)
    memories: dict[int, VolatileMemory] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    secrets: str | None = None
    order: Callable[[dict[int, bytes]], list[int]] = sorted
    threads: int = 1

    def __post_init__(self) -> None:
        self.sessions = {site: self.session(site) for site in self.sites}
        self.tally = Tally(parameters=self.parameters, roster=self.roster, threads=self.threads)
        self.heard: dict[str, dict[int, bytes]] = {stage: {} for stage in STAGES}
        self.said: dict[str, dict[int, bytes]] = {stage: {} for stage in STAGES}
        self.vectors: dict[int, Words] = {}

    def session(self, site: int, **changes: Any) -> SiteSession:
        memory = self.memories.setdefault(site, VolatileMemory())
        arguments: dict[str, Any] = {
            "identity": identity(site),
            "site": site,
            "roster": self.roster,
            "limits": self.limits,
            "memory": memory,
            "expected": self.parameters,
        }
        if self.secrets is not None:
            arguments["secrets"] = secrets_of(f"{self.secrets} {site}")
        return SiteSession(**{**arguments, **changes})

    def answer(self, stage: str, site: int, message: bytes) -> bytes:
        """One site's answer, kept in ``said``; the masked vector goes to ``vectors``."""
        session = self.sessions[site]
        self.heard[stage][site] = message
        if stage == "R2":
            words = self.inputs[site].copy()
            reply, self.vectors[site] = session.masked(message, words)
        else:
            names = {"R0": "hello", "R1": "shares", "R3": "consistency", "R4": "unmask"}
            reply = getattr(session, names[stage])(message)
        self.said[stage][site] = reply
        return reply

    def add(self, stage: str, site: int, reply: bytes) -> None:
        if stage == "R2":
            self.tally.add_masked(site, reply, self.vectors[site])
        else:
            names = {"R0": "hello", "R1": "shares", "R3": "consistency", "R4": "unmask"}
            getattr(self.tally, f"add_{names[stage]}")(site, reply)

    def exchange(self, stage: str, messages: dict[int, bytes]) -> None:
        """One exchange with everybody who is still there."""
        for site in self.order(messages):
            if self.gone.get(site, "never") > stage:  # "R3" > "R2", and "never" comes last
                self.add(stage, site, self.answer(stage, site, messages[site]))

    def run_to(self, stage: str) -> dict[int, bytes]:
        """Every exchange before this one; returns its messages by site."""
        messages = dict.fromkeys(self.sites, self.tally.request())
        closings = {
            "R0": self.tally.close_hellos,
            "R1": self.tally.close_shares,
            "R2": self.tally.close_masked,
            "R3": self.tally.close_consistency,
        }
        for name in STAGES[: STAGES.index(stage)]:
            self.exchange(name, messages)
            messages = closings[name]()
        return messages

    def run(self) -> SumResult:
        """The whole session."""
        self.exchange("R4", self.run_to("R4"))
        return self.tally.result()

    def plain_sum(self, sites: Iterable[int]) -> Words:
        total = np.zeros(self.parameters.words, dtype=self.parameters.grid.dtype)
        for site in sites:
            total += self.inputs[site]
        return total


def make_rig(
    sites: int | Iterable[int] = 4,
    *,
    gone: dict[int, str] | None = None,
    seed: int = 0,
    order: Callable[[dict[int, bytes]], list[int]] = sorted,
    secrets: str | None = None,
    limits: Limits | None = None,
    **changes: Any,
) -> Rig:
    """A rig of ``sites`` sites (a number, or their ids)."""
    ids = tuple(range(1, sites + 1)) if isinstance(sites, int) else tuple(sites)
    roster = make_roster(ids)
    parameters = make_parameters(roster, **changes)
    return Rig(
        sites=ids,
        parameters=parameters,
        roster=roster,
        inputs=make_inputs(parameters, ids, seed),
        gone=gone or {},
        order=order,
        secrets=secrets,
        limits=limits or Limits(),
    )
