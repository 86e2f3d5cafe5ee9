"""Operations under way: the `Work` a caller waits for, and the threads that carry operations out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from dseek.core.errors import PeerError
from dseek.parallel.transport.base import Transport

NO_TIMEOUT = timedelta(0)
"""What PyTorch passes for 'as long as it takes'."""

_PROGRESS_LIMIT_S = 0.2
_STOP_S = 1.0


class GroupError(PeerError, RuntimeError):
    """A collective or a message failed because of a peer; also a RuntimeError, as every backend of PyTorch raises."""


def group_error(found: str) -> GroupError:
    """Make the error for what a transport reports.

    Args:
        found: what happened.
    """
    return GroupError(found, remedy="look at the first rank that failed, and start all of them again")


class TransportWork(dist.Work):
    """One operation under way."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        """Start as unfinished; `outputs` is what `result` and the future give."""
        super().__init__()
        self._outputs = outputs
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._source = -1
        self._future: torch.futures.Future[object] | None = None
        self._checked: torch.futures.Future[list[torch.Tensor]] | None = None

    def finish(self, error: BaseException | None = None, source: int = -1) -> None:
        """Wake whoever waits.

        Args:
            error: why it failed, or None.
            source: the rank a message came from.
        """
        with self._lock:
            self._error, self._source = error, source
            self._done.set()
            future = self._future
        if future is not None:
            future.set_result(None)

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        """Block until the operation is done.

        Args:
            timeout: how long at most; zero has no limit but the group's own.

        Returns:
            True.

        Raises:
            GroupError: it failed, or is not done within `timeout`.
        """
        if not self._done.wait(timeout.total_seconds() if timeout > NO_TIMEOUT else None):
            raise group_error(f"an operation is not done within {timeout.total_seconds():g} s")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """Do what `wait` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the operation is done, well or not."""
        return self._done.is_set()

    def is_success(self) -> bool:
        """Whether the operation is done and did not fail."""
        return self._done.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        """Why the operation failed, or None."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """The tensors it writes."""
        return self._outputs

    def source_rank(self) -> int:
        """The rank a received message came from."""
        return self._source

    def _source_rank(self) -> int:
        return self._source

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A future of the tensors it writes; it fails where the operation does."""
        with self._lock:
            if self._checked is None:
                self._future = torch.futures.Future()
                # A callback that raises is the one way to give C++ an error that it takes for one.
                self._checked = self._future.then(self._outputs_or_error)
                is_done = self._done.is_set()
            else:
                is_done = False
        if is_done:
            assert self._future is not None
            self._future.set_result(None)
        return self._checked

    def _outputs_or_error(self, _: object) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._outputs


class InOrder:
    """Carries out one group's collectives one after the other, in the order they were asked for.

    A caller who waits anyway computes in its own thread where nothing is under way; the others have theirs done by a
    thread that starts with the first of them.
    """

    def __init__(self, name: str) -> None:
        """Prepare; `name` is the thread's."""
        self._name = name
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._num_pending = 0
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], TransportWork] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], None], work: TransportWork, *, inline: bool) -> None:
        """Carry out a call, or have it carried out.

        Args:
            call: the operation.
            work: finished afterwards.
            inline: whether the caller will wait for it anyway.
        """
        with self._lock:
            self._num_pending += 1
            runs_here = inline and self._num_pending == 1
            if runs_here:
                self._running.acquire()
            else:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                    self._thread.start()
                self._queue.put((call, work))
        if runs_here:
            try:
                self._carry_out(call, work)
            finally:
                self._running.release()

    def stop(self, interrupt: Callable[[], None]) -> None:
        """Let the thread end after what it has to do.

        Args:
            interrupt: makes what is still under way fail; called after a moment in which it may end well.
        """
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_STOP_S)
        interrupt()
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            with self._running:
                self._carry_out(*entry)

    def _carry_out(self, call: Callable[[], None], work: TransportWork) -> None:
        error: BaseException | None = None
        try:
            with torch.no_grad():
                call()
        except RuntimeError as failure:
            error = failure if isinstance(failure, GroupError) else group_error(str(failure))
        except BaseException as failure:
            error = failure
        with self._lock:
            self._num_pending -= 1
        work.finish(error)


class Mail:
    """Moves one group's messages in a thread of its own, any number at a time."""

    def __init__(self, transport: Transport, name: str) -> None:
        """Prepare for the messages of a `transport`; `name` is the thread's."""
        self._transport = transport
        self._name = name
        self._changed = threading.Condition()
        self._pending: dict[int, tuple[TransportWork, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def post(self, start: Callable[[], int], work: TransportWork, finish: Callable[[], None]) -> None:
        """Start a message.

        Args:
            start: tells the transport, returns the ticket.
            work: finished when the message is.
            finish: called before that where the message came through.
        """
        with self._changed:
            self._pending[start()] = (work, finish)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def stop(self) -> None:
        """End the thread; what is under way fails."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()
        for work, _ in self._pending.values():
            work.finish(group_error("the group was destroyed while a message was under way"))
        self._pending.clear()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_stopping)
                if self._is_stopping:
                    return
            try:
                finished = self._transport.progress(_PROGRESS_LIMIT_S)
            except RuntimeError as failure:
                with self._changed:
                    lost, self._pending = list(self._pending.values()), {}
                for work, _ in lost:
                    work.finish(group_error(str(failure)))
                continue
            for ticket, source, error in finished:
                with self._changed:
                    work, finish = self._pending.pop(ticket)
                if error:
                    work.finish(group_error(error), source)
                else:
                    with torch.no_grad():
                        finish()
                    work.finish(source=source)
