"""``fedward`` on a CPU with the gate open by which accelerate shards on accelerators alone.

What is behind the gate is accelerate's and torch's own: ``fully_shard``, here over gloo. Started by
``accelerate launch`` with a configuration that is shipped.
"""

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from fedward.cli import main

_begin = AcceleratorState.__init__


def _opened(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **given)
    if fsdp_plugin is not None:  # as for several GPUs there
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    if vars(self).get("fsdp_plugin") is not None:  # each instance begins, and all share one state
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _opened  # the gate
    main()
