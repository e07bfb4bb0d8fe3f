"""Many forward passes of one block side by side, each stopping where a group of weights is about to be used.

So the weights of a group are pruned on inputs that the block's earlier groups, already pruned, put out, and the block
is run once, not twice. Each pass is a greenlet: it stops inside a forward-pre-hook and goes on there later, whatever
code of whatever family lies around the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from lors_cli.models.blocks import PrunableWeight

Forward = Callable[[], torch.Tensor]
Observe = Callable[[int, torch.Tensor], None]
Solve = Callable[[int], "torch.Tensor | None"]


def shared_inputs(weights: dict[str, PrunableWeight], forward: Forward) -> list[list[str]] | None:
    """Which weights of a block read the same tensor, in the order they are called in a pass.

    Returns:
        Groups of names; None where passes cannot be stopped group by group, since the block has fused experts, or
        calls a weight more than once or not at all.
    """
    if any(weight.expert is not None for weight in weights.values()):
        return None
    calls: list[tuple[str, torch.Tensor]] = []
    with ExitStack() as stack:
        for name, weight in weights.items():
            hook = weight.module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
            stack.callback(hook.remove)
        forward()
    if sorted(name for name, _ in calls) != sorted(weights):
        return None
    groups: list[tuple[torch.Tensor, list[str]]] = []
    for name, tensor in calls:
        for shared, names in groups:
            if shared is tensor:
                names.append(name)
                break
        else:
            groups.append((tensor, [name]))
    return [names for _, names in groups]


def run_staged(
    leaders: Sequence[Any], forwards: Sequence[Forward], observe: Observe, solve: Solve
) -> Iterator[torch.Tensor]:
    """Run passes of one block together, stage by stage.

    Args:
        leaders: for each stage the module that is called first.
        forwards: one pass each.
        observe: told (stage, X) for every pass as it comes to the stage.
        solve: called with the stage once every pass is there; it may change the weights, and give a permutation (C,)
            of the input channels of the stage's one module.

    Yields:
        Each pass's result, in order.
    """
    from greenlet import getcurrent, greenlet

    hub = getcurrent()

    def stop(stage: int, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        permutation = hub.switch((stage, args[0]))
        return None if permutation is None else (args[0][..., permutation],)

    passes = [greenlet(forward) for forward in forwards]
    with ExitStack() as stack:
        for number, leader in enumerate(leaders):
            hook = leader.register_forward_pre_hook(lambda module, args, number=number: stop(number, module, args))
            stack.callback(hook.remove)
        permutation = None
        for stage in range(len(leaders)):
            for one in passes:
                reached, x = one.switch() if stage == 0 else one.switch(permutation)
                assert reached == stage, f"stage {reached} came before {stage}"
                observe(stage, x)
                del x
            permutation = solve(stage)
        for one in passes:
            result = one.switch(permutation)
            assert one.dead, "a stage was reached twice"
            yield result
