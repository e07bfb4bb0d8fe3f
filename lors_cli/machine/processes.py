"""Several processes on one job, as torchrun or `--nproc` starts them: who this one is, and what they tell each other.

Without them every function here answers for a single process and does nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long processes wait for one that solves, reads or writes alone."""
FAILURE_KEY = "lors/failure"
LAUNCHER = "LORS_LAUNCHER"
"""The environment variable that tells a process of `--nproc` who started it."""
_RUN = (
    "import sys; sys.path = [sys.argv.pop(1), *filter(None, sys.path)]; import lors_cli; del sys.path[0]; "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def num_processes() -> int:
    """How many processes share the job."""
    started_together = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["WORLD_SIZE"]) if started_together else 1


def process_index() -> int:
    """This one's number, from 0."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def local_index() -> int:
    """This one's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0")) if num_processes() > 1 else 0


def num_local_processes() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_processes() > 1 else 1


def is_main() -> bool:
    """Whether this process writes results and speaks to the user."""
    return process_index() == 0


def own_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of this package in a process of its own.

    As `python -m` does it, but for the working directory, which that would look for all modules in first: a user's
    `datasets.py` beside his recipe is none of ours. (PYTHONSAFEPATH does that from Python 3.11 on.)
    """
    return [sys.executable, "-c", _RUN, str(Path(__file__).parents[2]), module, *arguments]


# ---- coming and going


def is_joined() -> bool:
    """Whether this process and the others have found each other."""
    if num_processes() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Be together with the others for as long as the context lasts; an error leaves without a word to them.

    Tensors on a CPU go over Gloo, those on GPUs over NCCL.
    """
    if num_processes() == 1 or is_joined():
        yield
        return
    import torch
    import torch.distributed as dist

    has_gpus = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=PATIENCE)
    if has_gpus and local_index() < torch.cuda.device_count():
        torch.cuda.set_device(local_index())
    yield
    wait_for_all()
    dist.destroy_process_group()


def first_failure(exit_code: int) -> int | None:
    """The exit code of the process that failed before this one; None if this is the first, which then speaks."""
    if num_processes() == 1:
        return None
    if not is_joined():  # what can fail so early fails alike in all
        return None if is_main() else exit_code
    from torch.distributed import DistError
    from torch.distributed.distributed_c10d import _get_default_store

    mine = f"{process_index()} {exit_code}"
    try:
        found = _get_default_store().compare_set(FAILURE_KEY, "", mine).decode()
    except (DistError, RuntimeError):  # the process that kept the store is gone, and has said why
        return exit_code
    return None if found == mine else int(found.split()[1])


# ---- what they tell each other


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `tensor`, in place."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Sequence[torch.Tensor], told: Sequence[float]) -> list[float]:
    """Leave in parameters, alike in every process, the sum of all processes' gradients; the sums of what they told.

    A parameter that took part in no process keeps no gradient, as with one process.
    """
    if num_processes() == 1:
        return list(told)
    import torch

    gradients = [parameter.grad for parameter in parameters]
    exact = torch.float64 if any(each.dtype == torch.float64 for each in parameters) else torch.float32
    numbers = torch.tensor([*told, *(each is not None for each in gradients)], dtype=exact, device=parameters[0].device)
    parts = [
        torch.zeros_like(parameter).view(-1) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    total = add_up(torch.cat([numbers, *(part.to(exact) for part in parts)]))
    numbers, *found = total.split([len(numbers), *(len(part) for part in parts)])
    sums = numbers.tolist()
    for parameter, gradient, took_part in zip(parameters, found, sums[len(told) :], strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if took_part else None
    return sums[: len(told)]


def send_to_all(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Process `source`'s `tensor`, in place of everyone's."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, source)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order; plain data alone."""
    if num_processes() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * num_processes()
    dist.all_gather_object(found, value)
    return found


def deal(items: Sequence[S], work: Callable[[S], T], on_progress: Callable[[S], object] = lambda item: None) -> list[T]:
    """What `work` makes of each item, plain data, in their order: the processes take turns, and all get all of it.

    Args:
        items: the same in every process.
        work: called with this process's share.
        on_progress: called with every item once its turn is over.
    """
    mine = []
    for number, item in enumerate(items):
        if number % num_processes() == process_index():
            mine.append(work(item))
        on_progress(item)
    parts = gather(mine)
    return [parts[number % num_processes()][number // num_processes()] for number in range(len(items))]


def from_main(make: Callable[[], T]) -> T:
    """What the main process alone makes, plain data, for all of them; an error of it is everyone's."""
    if num_processes() == 1:
        return make()
    import torch.distributed as dist

    from lors_cli.errors import translate

    box: list[Any] = [None, None]
    try:
        if is_main():
            box[0] = make()
    except Exception as error:
        box[1] = translate(error) or RuntimeError(f"{type(error).__name__}: {error}")
        dist.broadcast_object_list(box, 0)
        raise
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def anyone(asked: bool) -> bool:
    """Whether some process says yes."""
    return any(gather(asked))


def wait_for_all() -> None:
    """Go on once every process has come here."""
    if num_processes() > 1:
        import torch.distributed as dist

        dist.barrier()
