"""Several processes that train one model: how they find each other, and how they agree.

With one process, all of it does nothing. Every function but `is_main` must be called by all
processes, since each waits for the others.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.differences import differences

T = TypeVar("T")
_CURE = "Start all of them with the same flags and the same code, on the same files."
_PARTING = 10.0  # seconds that processes with the same failure have to disconnect together
_LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # not SLURM_NTASKS: salloc sets it


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Processes that train one model together. By default there is one, or as many as Slurm
    (srun) or Open MPI (mpirun) started.
    """

    coordinator: str = ""
    """HOST:PORT at which process 0 can be reached; empty takes COORDINATOR_ADDRESS from the
    environment, or asks the cluster."""
    processes: int = 0
    """How many there are; 0 takes NUM_PROCESSES, or asks the cluster."""
    process: int = -1
    """Index of this one, from 0; -1 takes PROCESS_ID, or asks the cluster."""
    automatic: bool = False
    """Let JAX detect the cluster, such as a TPU pod or Kubernetes."""
    timeout: int = 300
    """Seconds to wait for the other processes at the start."""


def start(config: DistributedConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any. Call it before any other use of JAX.

    Raises:
      ValueError: the processes are described only in part, or wrongly.
      ConnectionError: the others did not connect in time.
    """
    arguments = _arguments(config, environ)
    if config.timeout < 1:
        raise ValueError(f"--distributed.timeout {config.timeout} must be at least 1 second.")
    if arguments is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=config.timeout)
    except ValueError as error:
        raise ValueError(
            f"{error} Name all of --distributed.coordinator HOST:PORT, --distributed.processes N "
            "and --distributed.process I, or none of them."
        ) from error
    except RuntimeError as error:
        raise ConnectionError(
            f"the processes did not find each other in {config.timeout} s "
            f"({str(error).partition(chr(10))[0][:200]}): are all started, with the same "
            f"coordinator ({arguments['coordinator_address'] or 'of the cluster'}), each with "
            "another number, and is that port open?"
        ) from error


def _arguments(config: DistributedConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for one process alone."""
    coordinator = config.coordinator or environ.get("COORDINATOR_ADDRESS", "")
    launched = any(int(environ.get(name) or 1) > 1 for name in _LAUNCHED)
    if not (coordinator or config.automatic or launched):
        if config.processes > 1 or config.process > 0:
            raise ValueError(
                "--distributed.processes and --distributed.process need to know where process 0 "
                "is: add --distributed.coordinator HOST:PORT."
            )
        return None
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"the coordinator {coordinator!r} has no port: write HOST:PORT.")
    count = config.processes or int(environ.get("NUM_PROCESSES", 0)) or None
    process = config.process if config.process >= 0 else int(environ.get("PROCESS_ID", -1))
    return {
        "coordinator_address": coordinator or None,
        "num_processes": count,
        "process_id": None if process < 0 else process,
    }


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends a failed process in seconds, without waiting for others that wait for it.

    JAX alone would wait for five minutes at its exit. Processes that fail together disconnect in
    order; otherwise the others find the connection lost, or miss the heartbeat after 100 s, and end
    too.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        _tell(error)
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PARTING)
        os._exit(code if isinstance(code, int) else 1)


def _tell(error: BaseException) -> None:
    """Prints what Python would print at its exit."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
        print("If another process failed first, its output says why.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()


def is_main() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def from_main(text: str) -> str:
    """The text that process 0 has."""
    return _gather(text)[0]


def on_main(action: Callable[[], T]) -> T | None:
    """Calls the action on process 0 alone, which gets the result; if it fails, all raise."""
    return on_all(lambda: action() if is_main() else None)


def on_all(action: Callable[[], T]) -> T:
    """Calls the action on each process, which gets its own result; if one fails, all raise."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    messages = _gather(_said(error))
    if error is not None:
        raise error
    failed = [f"process {i} failed: {said}" for i, said in enumerate(messages) if said]
    if failed:
        raise ValueError("; ".join(failed))
    return cast(T, result)


def _said(error: Exception | None) -> str:
    """The text of an error, or its name if it has no text; empty without an error."""
    return "" if error is None else str(error) or repr(error)


def check_same(fields: Mapping[str, Any], cure: str = _CURE) -> None:
    """Raises ValueError on all processes if these nested fields differ between them."""
    if jax.process_count() == 1:
        return
    text = json.dumps(fields, sort_keys=True)
    digests = multihost_utils.process_allgather(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    )
    if (digests == digests[0]).all():
        return
    first, *others = (json.loads(each) for each in _gather(text))
    lines = [
        f"process {i}: {'; '.join(differences(first, other)) or 'other fields'}"
        for i, other in enumerate(others, 1)
        if other != first
    ]
    raise ValueError(f"the processes disagree, process 0 -> another: {'. '.join(lines)}. {cure}")


def late() -> int:
    """How many calls later an `Agreement` answers."""
    return int(jax.process_count() > 1)


class Agreement:
    """Flags that hold for all processes as soon as one of them has raised them.

    With several processes, all see the flags of a call one call later: if they waited for each
    other within a step, the devices would be idle.
    """

    def __init__(self):
        self._pending: deque[jax.Array] = deque()

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """The flags of this call, or with several processes of the call before."""
        if jax.process_count() == 1:
            return flags
        self._pending.append(_any(flags))
        if len(self._pending) == late():
            return (False,) * len(flags)
        return tuple(bool(x) for x in np.asarray(self._pending.popleft()))

    def at_once(self, *flags: bool) -> tuple[bool, ...]:
        """The flags of this call, for which the processes wait for each other."""
        seen = [self(*flags) for _ in range(1 + late())]
        return seen[-1]


def _any(flags: Sequence[bool]) -> jax.Array:
    """bool[flags], in flight to every process."""
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"))
    mine = np.array([flags], np.bool_)
    rows = multihost_utils.host_local_array_to_global_array(mine, mesh, P("process"))
    return _reduce(NamedSharding(mesh, P()))(rows)


@functools.cache
def _reduce(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_over_rows, out_shardings=sharding)


def _over_rows(rows: jax.Array) -> jax.Array:
    return jnp.any(rows, axis=0)


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, int(lengths.max()) + 1 - len(data)))  # an empty array has no shards
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths.ravel(), strict=True)]
