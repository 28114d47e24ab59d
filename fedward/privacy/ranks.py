"""One site's step on several processes: each takes a part of the drawn units.

All processes hold the same stream, so that each draws the same units and the same noise without
asking. Only the clipped sums are added up (all-reduce), and the noise once to their sum: the step
is the one that a single process would take. The model may be whole in every process, as under DDP,
or its frozen weights sharded by FSDP2 (``fully_shard`` with the trainable ones ignored).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fedward.errors import ModelError
from fedward.privacy.noise import SecureStream


class Ranks:
    """The processes of an initialised ``torch.distributed`` group, this one among them.

    Args:
        group: The group; left out, the default one.

    Attributes:
        rank: This process, 0 and up.
        size: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def agree(self, model: nn.Module, stream: SecureStream) -> None:
        """Check that all hold the same stream, and start from the first one's parameters.

        Raises:
            ModelError: The streams differ: every process would draw its own units and noise.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        word = int(stream.child("ranks").words(1)[0] >> 1)
        mine = torch.tensor([word], device=trainable[0].device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        if len({int(x) for x in found}) != 1:
            raise ModelError(
                "the processes of a step have different streams; give each SecureStream the same "
                "key, which never leaves the site"
            )
        for parameter in trainable:
            dist.broadcast(parameter.data, group=self._group, group_src=0)

    def share(self, drawn: Sequence[list[int]]) -> Sequence[list[int]]:
        """The drawn units that this process takes."""
        return drawn[self.rank :: self.size]

    def add_up(self, totals: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one exchange."""
        flat = torch.cat([total.flatten() for total in totals])
        dist.all_reduce(flat, group=self._group)
        sums = torch.split_with_sizes(flat, [total.numel() for total in totals])
        for total, summed in zip(totals, sums, strict=True):
            total.copy_(summed.view_as(total))

    def most(self, n: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        number = torch.tensor([n], device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)


def is_sharded(model: nn.Module) -> bool:
    """Whether passes of the model exchange weights, so that all processes must do as many."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
