"""The trainer of a site's folder: which records, which model, which device; and its life."""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Callable

import torch

from fedward.client.data_sources import load_source, model_folder, site_records
from fedward.client.policy import Policy, load_policy
from fedward.client.sandbox import seal
from fedward.client.site_folder import SiteFolder
from fedward.client.trainer import LocalTrainer
from fedward.client.trainer_service import MakeTrainer, serve
from fedward.errors import ModelError
from fedward.plan import Plan
from fedward.tuning.vector import Layout


def trainer_maker(folder: SiteFolder) -> MakeTrainer:
    """What makes a trainer for each plan out of a site's folder.

    A plan's words can name modules by a pattern, so the policy's list of modules that stay frozen
    is held against the loaded model here.
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
        )
        check_trained(trainer.tuned(plan).layout, policy)
        return trainer

    return make


def within_policy(folder: SiteFolder, make: MakeTrainer) -> MakeTrainer:
    """The same, for plans that the site's policy allows at some hour.

    The agent has asked the policy already; but the agent has a network and may be taken over, and
    must not get an update without noise for it.
    """

    def checked(plan: Plan, dataset: str, on_step: Callable[[int], None]) -> LocalTrainer:
        dataclasses.replace(load_policy(folder.policy), hours=()).check(plan)
        return make(plan, dataset, on_step)

    return checked


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
    server = serve(folder.trainer_socket, within_policy(folder, trainer_maker(folder)))
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
