"""SCAFFOLD at a site: its own control variate c_i, kept with its personal parts, and what it does.

Each step goes along ``g - c_i + c``, added after clip and noise (Karimireddy et al. 2020, arXiv
1910.06378, Algorithm 1; under privacy Noble et al. 2022, arXiv 2111.09278, Algorithm 1). The c_i
after a round is ``c_i - c - u / (K lr)``, ``u`` being the update that is sent (option II).

Guarantees:
    c_i is made of the site's own noised updates and c of their sums, so both are post-processing
    and cost no privacy, if c_i goes on only from updates that the ledger has charged: the agent
    names one by its number among those that left. c_i itself never leaves.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedward.aggregation.control import CONTROL, split_control
from fedward.client.training import TrainRequest
from fedward.errors import ModelError
from fedward.tuning.adapter import State
from fedward.tuning.vector import Vector, dimension, moments_of


class Variates:
    """A site's and the shared control variate in one round.

    Args:
        request: Its adapter has c, unless that is zero yet.
        kept: What :meth:`after` gave for the update that the request goes on from; empty at first.

    Raises:
        ModelError: One of them does not fit the layout.
    """

    def __init__(self, request: TrainRequest, kept: State) -> None:
        self._request, shape = request, (dimension(request.trained),)
        zeros = np.zeros(shape, dtype=np.float32)
        shared, _ = split_control(moments_of(request.adapter))
        self._shared = zeros if shared is None else shared
        self._own: Vector = kept[CONTROL].numpy() if CONTROL in kept else zeros
        for vector in (self._shared, self._own):
            if vector.shape != shape:
                raise ModelError(f"expected a control variate of shape {shape}, got {vector.shape}")
        self._correction = torch.from_numpy(self._shared - self._own)

    def correct(self, parameters: Sequence[Tensor]) -> None:
        """Add c - c_i to the gradients of the trained parameters, in the layout's order."""
        parts = self._correction.split_with_sizes([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(part.view(parameter.shape).to(parameter.grad))

    def after(self, update: Vector) -> State:
        """What to keep in case that the update leaves: the next c_i.

        Args:
            update: ``(d,)`` float32, as it was trained; it counts as it will be sent.
        """
        rounds = self._request.plan.rounds
        moved = self._request.rule.to_send(update).astype(np.float64)
        moved /= rounds.steps * rounds.learning_rate
        own = self._own.astype(np.float64) - self._shared - moved
        return {CONTROL: torch.from_numpy(own.astype(np.float32))}
