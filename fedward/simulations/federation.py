"""One whole federation in this process: coordinator, sites and the grid between them.

Every site has a folder of its own with key, policy, ledger and memory, as a hospital would; a
killed site is built again from that folder. Nothing is mocked but the wire.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedward.client.agent import Agent
from fedward.client.app import client_app
from fedward.client.memory import SiteMemory
from fedward.client.policy import load_policy
from fedward.client.training import Trainer
from fedward.errors import CohortTooSmall
from fedward.identity import Identity, Member, Roster
from fedward.plan import Plan
from fedward.privacy.ledger import Ledger
from fedward.server.app import server_app
from fedward.server.gate import Loss
from fedward.server.rounds import RoundEngine
from fedward.server.sessions import Observer
from fedward.server.store import RunStore
from fedward.simulations.grid import FIRST_NODE, Fault, LocalGrid, Watch
from fedward.tuning.vector import Layout

RUN = "simulation"
"""The run's name in every simulation folder."""


class Federation:
    """Sites and coordinator of one simulation, kept in one folder.

    Args:
        folder: Made on first use; the same folder goes on where it stopped.
        plan: The frozen plan.
        start: The adapter's first state, safetensors bytes.
        layout: Names and shapes of the trainable tensors.
        trainers: Site name → its trainer.
        workers: Sites that may work at the same time.
        fault: Kills sites; None kills nobody.
        watch: Sees every message that crosses between coordinator and sites.
        keys: Site name → secret key of noise and rounding; only tests fix them.
        fallback: The coordinator's own training, of a plan with ``[fallback]``.
        gate: Tries an adapter on the coordinator's own records, of a plan with ``[gate]``.
        agents: Site name → another agent than the one that everybody has, for attacks.

    Raises:
        CohortTooSmall: Fewer sites than the plan's minimum.
    """

    def __init__(
        self,
        *,
        folder: Path,
        plan: Plan,
        start: bytes,
        layout: Layout,
        trainers: Mapping[str, Trainer],
        workers: int = 1,
        fault: Fault | None = None,
        watch: Watch | None = None,
        keys: Mapping[str, bytes] | None = None,
        fallback: Callable[[int, bytes], bytes] | None = None,
        gate: Loss | None = None,
        agents: Mapping[str, type[Agent]] | None = None,
    ) -> None:
        if len(trainers) < plan.cohort.minimum:
            raise CohortTooSmall(
                f"the data makes {len(trainers)} sites, but [cohort] minimum = "
                f"{plan.cohort.minimum}: give data with more sites or lower the minimum"
            )
        self._folder, self._plan = folder, plan
        self._fallback, self._gate = fallback, gate
        self._start, self._layout = start, layout
        self._trainers, self._keys = dict(trainers), dict(keys or {})
        self._agents = dict(agents or {})
        self._held: dict[str, tuple[Ledger, SiteMemory]] = {}
        self._identity = _identity(folder / "coordinator")
        self.names = tuple(sorted(trainers))
        """Site names; a site's id is its place in this order."""
        self.roster = Roster(
            epoch=1,
            coordinator=self._identity.public_key,
            members=tuple(
                Member(id=i, name=name, public_key=_identity(self._site(name)).public_key)
                for i, name in enumerate(self.names)
            ),
        )
        for name in self.names:
            _write_policy(self._site(name) / "policy.toml", plan)
        self.nodes = {i: i + FIRST_NODE for i in range(len(self.names))}
        """Site id → node of the grid."""
        self.grid = LocalGrid(
            {self.nodes[i]: self._factory(i, name) for i, name in enumerate(self.names)},
            workers=workers,
            fault=fault,
            watch=watch,
        )

    def run(self, observer: Observer = lambda *_: None) -> bytes:
        """Run every round that is not committed yet; returns the final adapter."""
        store = RunStore(self._folder / "coordinator")
        engine = RoundEngine(
            plan=self._plan,
            run=RUN,
            identity=self._identity,
            roster=self.roster,
            nodes=self.nodes,
            store=store,
            start=self._start,
            layout=self._layout,
            observer=observer,
            fallback=self._fallback,
            gate=self._gate,
        )
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        try:
            server_app(engine)(grid=self.grid, context=context)
            return engine.adapter
        finally:
            store.close()
            self.grid.close()
            for name in self.names:
                self._let_go(name)

    def epsilon_spent(self, name: str) -> float:
        """What a site's patients have spent, recomputed from its ledger."""
        self._let_go(name)
        ledger = self._open_ledger(name)
        try:
            return ledger.epsilon_spent()
        finally:
            ledger.close()

    def _open_ledger(self, name: str) -> Ledger:
        policy = load_policy(self._site(name) / "policy.toml")
        return Ledger.open(
            self._site(name) / "ledger.jsonl",
            _identity(self._site(name)),
            epsilon=policy.max_epsilon,
            delta=policy.delta,
        )

    def _factory(self, site: int, name: str) -> Callable[[], ClientApp]:
        def build() -> ClientApp:
            folder, identity = self._site(name), _identity(self._site(name))
            self._let_go(name)
            ledger = self._open_ledger(name)
            memory = SiteMemory.open(folder / "memory.jsonl", identity, ledger)
            self._held[name] = (ledger, memory)
            return client_app(
                self._agents.get(name, Agent)(
                    site=site,
                    identity=identity,
                    roster=self.roster,
                    policy=load_policy(folder / "policy.toml"),
                    ledger=ledger,
                    memory=memory,
                    trainer=self._trainers[name],
                    key=self._keys.get(name),
                )
            )

        return build

    def _let_go(self, name: str) -> None:
        """Close the files of a site whose process is gone."""
        for file in self._held.pop(name, ()):
            file.close()

    def _site(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        return self._folder / "sites" / f"{self.names.index(name):04d}-{safe}"


def _identity(folder: Path) -> Identity:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Identity.load_or_create(folder / "key")


def _write_policy(path: Path, plan: Plan) -> None:
    """A policy that allows this plan and nothing beyond it."""
    epsilon = plan.privacy.epsilon + (plan.metrics.epsilon if plan.metrics else 0.0)
    path.write_text(
        f"max_epsilon = {epsilon!r}\n"
        f"delta = {plan.privacy.delta!r}\n"
        f"max_rounds = {plan.rounds.count + plan.rounds.spare}\n"
        f'models = ["{plan.model.sha256}"]\n'
        f'modes = ["{plan.mode}"]\n'
        f'objectives = ["{plan.task.objective}"]\n'
        f'methods = ["{plan.tuner.method}"]\n'
        f"minimum = {plan.cohort.minimum}\n"
        f"colluders = {plan.cohort.colluders}\n"
        "automatic = true\n",
        encoding="utf-8",
    )
