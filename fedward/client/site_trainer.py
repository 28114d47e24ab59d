"""The trainer of a site's folder: which records, which model, which device; and its life."""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Callable

import torch

from fedward.canonical import digest
from fedward.client.data_sources import load_source, model_folder
from fedward.client.policy import Policy, load_policy
from fedward.client.sandbox import seal
from fedward.client.site_folder import SiteFolder
from fedward.client.site_records import files_identity, site_records
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import Admit, MakeTrainer, serve
from fedward.errors import ModelError, PolicyRefusal
from fedward.plan import Plan
from fedward.tuning.adapter import layout
from fedward.tuning.vector import Layout


def trainer_maker(folder: SiteFolder, *, keep: bool = True) -> MakeTrainer:
    """What makes a trainer for each plan out of a site's folder.

    A plan's words can name modules by a pattern, so the policy's list of modules that stay frozen
    is held against the loaded model here.

    Args:
        folder: The site's.
        keep: Whether the personal parts of a plan are kept there.
    """

    def make(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        config, policy = folder.config(), load_policy(folder.policy)
        if policy.gpu_memory is not None and config.device.startswith("cuda"):
            _limit_memory(config.device, policy.gpu_memory)
        records, held_out = site_records(
            load_source(folder, dataset), plan, held_out=config.held_out
        )
        trainer = LocalTrainer(
            records,
            held_out=held_out,
            device=config.device,
            physical_batch=config.physical_batch,
            model=model_folder(folder, plan),
            on_step=on_step,
            keep=folder.personal if keep else None,
        )
        check_trained(layout(trainer.tuned(plan).model), policy)
        return trainer

    return make


def admission(folder: SiteFolder) -> Admit:
    """What admits plans to a site's trainer: its policy, and the data source that was approved.

    The agent has asked both already; but the agent has a network and may be taken over, and must
    not get an update without noise for it. The answer covers whatever a trainer is made of: policy,
    configuration, the source's declaration and its files.
    """

    def admit(plan: Plan, dataset: str, approved: bytes) -> bytes:
        policy, source = load_policy(folder.policy), load_source(folder, dataset)
        reasons = list(dataclasses.replace(policy, hours=()).reasons(plan))
        reasons += policy.source_reasons(plan, source)
        if dataset not in policy.datasets:
            reasons.append(f"data source {dataset!r} is not in datasets")
        if source.hash() != approved:
            reasons.append(f"data source {dataset!r} has changed since the agent looked at it")
        if reasons:
            raise PolicyRefusal(reasons)
        config = folder.config_file.read_bytes()
        return digest("trainer", policy.hash(), config, source.hash(), files_identity(source))

    return admit


def check_trained(layout: Layout, policy: Policy) -> None:
    """Refuse a model whose trainable tensors lie in a module that the policy keeps frozen.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, _ in layout:
        if set(name.split(".")) & set(policy.frozen):
            raise ModelError(f"the plan trains {name!r}, which is in the policy's frozen")


def run_trainer(folder: SiteFolder, *, child: bool) -> None:
    """Serve a site's trainer until its parent is gone (``child``), or for ever.

    The process must be confined already (:func:`fedward.client.sandbox.confine`); it is sealed as
    soon as it listens.

    Raises:
        ConfigurationError: It cannot listen, or the system has no sandbox.
    """
    if folder.config().device.startswith("cuda"):
        torch.empty(0, device=folder.config().device)  # while the driver may still open sockets
    server = serve(folder.trainer_socket, trainer_maker(folder), admission(folder))
    _tell_systemd("READY=1")
    seal()
    if not child:
        server.wait_for_termination()
        return
    sys.stdin.buffer.read()  # ends with the parent, however that ends
    logging.shutdown()
    os._exit(0)  # a training that still runs is not waited for: nothing of it is kept


def _limit_memory(device: str, gibibytes: float) -> None:
    _, total = torch.cuda.mem_get_info(device)
    share = min(1.0, gibibytes * 2**30 / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _tell_systemd(state: str) -> None:
    """sd_notify(3): one datagram to the socket that systemd names."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + path[1:] if path.startswith("@") else path)
            notify.send(state.encode())
