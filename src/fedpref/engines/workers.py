"""Worker processes of one thread each.

On small models they are faster than threads, and sums are the same for any number of them.
"""

from __future__ import annotations

import ctypes
import gc
import io
import multiprocessing
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from fedpref.errors import UserError

Job = Callable[..., Any]  # job(client, shared arguments, own arguments)


def can_fork() -> bool:
    """Return whether worker processes can share this one's memory.

    They cannot on macOS and Windows, nor once a GPU is open.
    """
    return sys.platform == "linux" and not torch.cuda.is_initialized()


class _Within(threading.local):
    """How deep a thread is within `one_thread`."""

    depth = 0


_WITHIN, _COUNTED = _Within(), threading.Lock()
_OUTSIDE = {"within": 0, "threads": 1}  # threads that are within, and what torch had before


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, within a `with`; then sums do not depend on the machine's size.

    The setting is the calling thread's, and what threads begin with that come later: of several
    that are within at once each is left with what the first one has found.
    """
    _WITHIN.depth += 1
    with _COUNTED:
        if not _OUTSIDE["within"]:
            _OUTSIDE["threads"] = torch.get_num_threads()
        _OUTSIDE["within"] += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _WITHIN.depth -= 1
        with _COUNTED:
            _OUTSIDE["within"] -= 1
        if not _WITHIN.depth:
            torch.set_num_threads(_OUTSIDE["threads"])


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep large blocks.

    It would give them back to the system and fault them in again at every step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another libc: nothing to tune
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 27)  # M_TOP_PAD


class Workers:
    """Forked processes that share this one's memory, model and data included, as it was at the
    fork.

    Args:
        count: How many.
        job: What they do, as job(client, shared arguments, own arguments).
        begin: Called by each with its number, from 0, before its work, and it may be so often.
    """

    def __init__(self, count: int, job: Job, begin: Callable[[int], None]) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes = []
        # or a worker's collector walks all that it inherited, and with it copies the pages
        gc.freeze()
        for number in range(count):
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            process = context.Process(
                target=_serve,
                args=(theirs, tuple(self._connections), job, partial(begin, number)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        gc.unfreeze()

    def run(self, shared: Any, own: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Yield each client and the job's result, as they come in.

        A worker that is free takes the next client.
        """
        message = pack(("shared", shared))
        clients = iter(own)
        busy: dict[Any, int] = {}
        failure: Exception | None = None

        def send(connection: Connection, client: int, arguments: Any) -> None:
            busy[connection] = client
            connection.send_bytes(pack(("own", client, arguments)))

        for connection, (client, arguments) in zip(self._connections, clients, strict=False):
            try:
                connection.send_bytes(message)
                send(connection, client, arguments)
            except OSError as error:
                raise _died(client) from error
        while busy:
            for connection in cast("list[Connection]", wait(list(busy))):
                client = busy.pop(connection)
                try:
                    kind, value = pickle.loads(connection.recv_bytes())  # from our own fork
                except (EOFError, OSError) as error:
                    raise _died(client) from error
                if kind != "result":
                    failure = (
                        UserError(value)
                        if kind == "refused"
                        else RuntimeError(f"in the work of client {client}:\n{value}")
                    )
                # after a failure no more is begun, but workers that are busy are heard, so that
                # none is left writing
                if failure is None and (following := next(clients, None)) is not None:
                    try:
                        send(connection, *following)
                    except OSError as error:
                        raise _died(following[0]) from error
                if failure is None:
                    yield client, value
        if failure:
            raise failure

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()


def _died(client: int) -> UserError:
    return UserError(
        f"the worker process of client {client} has died, perhaps for want of memory. Take fewer "
        "`workers`, or smaller batches, and resume the run; its last checkpoint is whole."
    )


def _serve(
    connection: Connection, others: Sequence[Connection], job: Job, begin: Callable[[], None]
) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in others:
        # the parent's ends, which the fork copied: so that a worker sees its parent go
        other.close()
    torch.set_num_threads(1)
    shared: Any = None
    while True:
        try:
            kind, *content = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if kind == "shared":
            (shared,) = content
            continue
        try:
            begin()
            answer = ("result", job(content[0], shared, content[1]))
        except UserError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        try:
            connection.send_bytes(pack(answer))
        except BrokenPipeError:
            return  # whoever asked is gone


class _Pickler(pickle.Pickler):
    """A pickler that takes tensors as plain arrays, ten times faster than their own way."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            return _tensor, (
                array.flatten().view(torch.uint8).numpy(),
                array.dtype,
                tuple(array.shape),
            )
        return NotImplemented


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).view(shape)


def pack(value: Any) -> bytes:
    """Return a value as bytes, for another process of our own."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()
