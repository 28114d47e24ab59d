"""A site that trains the first components of the adapter alone (``[tuner] ranks``).

The next adapter's components come in the order of importance, so the first k of them are its best
approximation of rank k. The site's trainer is asked for a plan of that rank and never sees the
others; in the update their move is zero. The mean of products then is that of the whole adapters:
what a site does not train stands in it as it was (scheme ``sketch``).
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from fedward.aggregation.products import split
from fedward.client.training import TrainRequest, TrainResult
from fedward.plan import Plan
from fedward.tuning.vector import Layout, replace_vector, vector_of

_DEFAULT = 8  # PEFT's, of r and of lora_alpha


def own_rank(plan: Plan, name: str) -> int | None:
    """The rank that a site trains, where that is not the plan's own.

    Args:
        plan: The plan.
        name: The site's, as the roster has it.
    """
    rank = (plan.tuner.ranks or {}).get(name)
    return None if rank == plan.tuner.arguments.get("r", _DEFAULT) else rank


def narrowed(request: TrainRequest, rank: int | None) -> TrainRequest:
    """What the site's trainer is asked for: plan, adapter and layout of its own rank.

    ``lora_alpha`` shrinks with the rank, so that the factor before B·A is the same at every site.

    Args:
        request: Of the whole adapter.
        rank: From :func:`own_rank`; None asks for all of it.

    Raises:
        ModelError: The adapter does not fit the layout.
    """
    if rank is None:
        return request
    plan = request.plan
    given = dict(plan.tuner.arguments)
    share = rank / given.get("r", _DEFAULT)
    root = plan.tuner.method == "rslora" or given.get("use_rslora", False)
    alpha = given.get("lora_alpha", _DEFAULT) * (math.sqrt(share) if root else share)
    arguments = given | {"r": rank, "lora_alpha": alpha}
    whole = vector_of(request.adapter, request.layout)  # first: no layout is larger than that
    layout, places = _kept(request.layout, rank)
    vector = whole[places]
    return dataclasses.replace(
        request,
        plan=dataclasses.replace(
            plan, tuner=dataclasses.replace(plan.tuner, arguments=arguments, ranks=None)
        ),
        adapter=replace_vector(request.adapter, layout, vector),
        layout=layout,
    )


def widened(result: TrainResult, request: TrainRequest, rank: int | None) -> TrainResult:
    """The trainer's update among the whole adapter's parameters: zero where it did not train.

    Args:
        result: Of the request that :func:`narrowed` gave.
        request: Of the whole adapter.
        rank: As there.
    """
    if rank is None:
        return result
    _, places = _kept(request.layout, rank)
    update = np.zeros(sum(math.prod(shape) for _, shape in request.layout), dtype=np.float32)
    update[places] = result.update
    return dataclasses.replace(result, update=update)


def _kept(layout: Layout, rank: int) -> tuple[Layout, npt.NDArray[np.intp]]:
    """The layout at a lower rank, and where its numbers lie in the whole vector."""
    pairs = split(layout)[0]
    rows, columns = {pair.a.start for pair in pairs}, {pair.b.start for pair in pairs}
    kept, places, start = list[tuple[str, tuple[int, ...]]](), list[npt.NDArray[np.intp]](), 0
    for name, shape in layout:
        part = np.arange(start, start + math.prod(shape)).reshape(shape)
        if ".lora_A." in name and start in rows:
            part = part[:rank]
        elif ".lora_B." in name and start in columns:
            part = part[:, :rank]
        kept.append((name, part.shape))
        places.append(part.ravel())
        start += math.prod(shape)
    return tuple(kept), np.concatenate(places)
