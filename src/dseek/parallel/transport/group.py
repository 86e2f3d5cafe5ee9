"""The process group that `torch.distributed` sees: its conventions on this side, a `Transport` on the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

from dseek.core.errors import ConfigError
from dseek.parallel.transport.base import Transport
from dseek.parallel.transport.native import reducible
from dseek.parallel.transport.staging import BACKEND_NAME, Staged, check_gathered, cut, fill, split
from dseek.parallel.transport.work import InOrder, Mail, TransportWork

_TAG_MASK = (1 << 32) - 1


class TransportGroup(dist.ProcessGroup):
    """The ranks of one group over one transport.

    The methods are those of `torch.distributed.ProcessGroup`, called by its functions, DDP, FSDP2 and DTensor. Tensors
    are of any layout: one that is not contiguous is copied before, and filled after the operation.
    """

    def __init__(self, transport: Transport, timeout: timedelta) -> None:
        """Run a group on a connected `transport`; `timeout` is how long it waits for silent peers."""
        super().__init__(transport.rank, transport.world_size)  # type: ignore[call-arg]  # the stub has one of two
        self.transport = transport
        self.set_timeout(timeout)
        self._name = self._description = ""
        label = f"dseek-group-{id(self):x}"
        self._in_order = InOrder(label)
        self._mail = Mail(transport, f"{label}-mail")
        self._closing = threading.Lock()
        self._is_closed = False

    @property
    def group_name(self) -> str:
        """The name PyTorch has given it."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    setGroupName = _set_group_name  # noqa: N815  (what C++ looks for)

    def getGroupName(self) -> str:  # noqa: N802
        """The same for C++."""
        return self._name

    @property
    def group_desc(self) -> str:
        """The description PyTorch has given it."""
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    setGroupDesc = _set_group_desc  # noqa: N815

    def getGroupDesc(self) -> str:  # noqa: N802
        """The same for C++."""
        return self._description

    def name(self) -> str:
        """The backend's name."""
        return BACKEND_NAME

    def getBackendName(self) -> str:  # noqa: N802
        """The same for C++."""
        return BACKEND_NAME

    def _get_backend_name(self) -> str:
        return BACKEND_NAME

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> TransportGroup:
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"the process group {BACKEND_NAME} moves tensors of the CPU, not of {device}")
        return self

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def set_timeout(self, timeout: timedelta) -> None:
        """Wait for silent peers up to `timeout` from now on."""
        self._timeout_s = timeout.total_seconds()
        self.transport.set_message_timeout(self._timeout_s)

    _set_default_timeout = set_timeout

    # Collectives.

    def allreduce(self, tensors: list[torch.Tensor], opts: dist.AllreduceOptions) -> TransportWork:
        return self._reduce_all(tensors, opts)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: dist.AllreduceCoalescedOptions) -> TransportWork:
        return self._reduce_all(tensors, opts)

    def _reduce_all(self, tensors: list[torch.Tensor], opts: dist.AllreduceOptions) -> TransportWork:
        if any(tensor.is_sparse for tensor in tensors):
            raise ConfigError(f"the process group {BACKEND_NAME} reduces no sparse tensors", remedy="use gloo for them")
        timeout_s = self._limit(opts.timeout)
        staged = [Staged(tensor, is_read=True) for tensor in tensors]
        parts = [reducible(one.flat, opts.reduceOp) for one in staged]

        def call() -> None:
            for part, reduction in parts:
                self.transport.all_reduce(part, reduction, timeout_s)
            fill(staged)

        return self._start(call, tensors, opts.asyncOp)

    def reduce(self, tensors: list[torch.Tensor], opts: dist.ReduceOptions) -> TransportWork:
        timeout_s, staged = self._limit(opts.timeout), Staged(tensors[0], is_read=True)
        part, reduction = reducible(staged.flat, opts.reduceOp)

        def call() -> None:
            self.transport.reduce(part, reduction, opts.rootRank, timeout_s)
            fill([staged])

        return self._start(call, tensors, opts.asyncOp)

    def broadcast(self, tensors: list[torch.Tensor], opts: dist.BroadcastOptions) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        staged = [Staged(tensor, is_read=self.rank() == opts.rootRank) for tensor in tensors]

        def call() -> None:
            for one in staged:
                self.transport.broadcast(one.flat, opts.rootRank, timeout_s)
            if self.rank() != opts.rootRank:
                fill(staged)

        return self._start(call, tensors, opts.asyncOp)

    def barrier(self, opts: dist.BarrierOptions) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        return self._start(lambda: self.transport.barrier(timeout_s), [], opts.asyncOp)

    def allgather(
        self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: AllgatherOptions
    ) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        sources = [Staged(one, is_read=True) for one in inputs]
        outs = [[Staged(tensor, is_read=False) for tensor in group] for group in output_lists]
        for source, group in zip(sources, outs, strict=True):
            check_gathered(group, source, self.rank(), self.size())

        def call() -> None:
            for source, group in zip(sources, outs, strict=True):
                self.transport.all_gather(source.flat, [out.flat for out in group], timeout_s)
                fill(group)

        return self._start(call, [tensor for group in output_lists for tensor in group], opts.asyncOp)

    allgather_coalesced = allgather  # type: ignore[assignment]

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, opts: AllgatherOptions) -> TransportWork:
        return self.all_gather_single_coalesced([output], [source], opts)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: AllgatherOptions
    ) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        sources = [Staged(one, is_read=True) for one in inputs]
        outs = [Staged(one, is_read=False) for one in outputs]
        parts = [split(out.flat, source.flat, self.size()) for out, source in zip(outs, sources, strict=True)]

        def call() -> None:
            for source, part in zip(sources, parts, strict=True):
                self.transport.all_gather(source.flat, part, timeout_s)
            fill(outs)

        return self._start(call, outputs, opts.asyncOp)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: dist.ReduceScatterOptions
    ) -> TransportWork:
        timeout_s, out = self._limit(opts.timeout), Staged(outputs[0], is_read=False)
        sources = [Staged(one, is_read=True) for one in input_lists[0]]
        target, reduction = reducible(out.flat, opts.reduceOp)
        parts = [reducible(source.flat, opts.reduceOp)[0] for source in sources]
        if parts[self.rank()].numel() != target.numel() or len({part.numel() for part in parts}) > 1:
            return self._reduce_scatter_uneven(parts, target, reduction, out, timeout_s, opts.asyncOp)

        def call() -> None:
            self.transport.reduce_scatter(parts, target, reduction, timeout_s)
            fill([out])

        return self._start(call, outputs, opts.asyncOp)

    def _reduce_scatter_uneven(
        self,
        parts: list[torch.Tensor],
        target: torch.Tensor,
        reduction: str,
        out: Staged,
        timeout_s: float,
        is_async: bool,
    ) -> TransportWork:
        """Reduce one part after the other to the rank it is for, where the parts differ in size."""
        if parts[self.rank()].numel() != target.numel():
            raise ConfigError(
                f"reduce_scatter has an output of {target.numel()} elements for a part of {parts[self.rank()].numel()}"
            )
        work = [part.clone() for part in parts]

        def call() -> None:
            for root, part in enumerate(work):
                self.transport.reduce(part, reduction, root, timeout_s)
            target.copy_(work[self.rank()])
            fill([out])

        return self._start(call, [out.tensor], is_async)

    def reduce_scatter_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: dist.ReduceScatterOptions
    ) -> TransportWork:
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: dist.ReduceScatterOptions
    ) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        sources = [Staged(one, is_read=True) for one in inputs]
        outs = [Staged(one, is_read=False) for one in outputs]
        calls = []
        for out, source in zip(outs, sources, strict=True):
            target, reduction = reducible(out.flat, opts.reduceOp)
            parts = split(reducible(source.flat, opts.reduceOp)[0], target, self.size())
            calls.append((parts, target, reduction))

        def call() -> None:
            for parts, target, reduction in calls:
                self.transport.reduce_scatter(parts, target, reduction, timeout_s)
            fill(outs)

        return self._start(call, outputs, opts.asyncOp)

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: dist.AllToAllOptions
    ) -> TransportWork:
        return self._exchange(
            [Staged(one, is_read=True) for one in inputs],
            [Staged(one, is_read=False) for one in outputs],
            outputs,
            opts,
        )

    def all_to_all_single(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> TransportWork:
        timeout_s = self._limit(opts.timeout)
        given, taken = Staged(source, is_read=True), Staged(output, is_read=False)
        inputs = cut(given.flat, source, input_sizes, self.size(), "input")
        outs = cut(taken.flat, output, output_sizes, self.size(), "output")

        def call() -> None:
            self.transport.all_to_all(inputs, outs, timeout_s)
            fill([taken])

        return self._start(call, [output], opts.asyncOp)

    def gather(
        self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: dist.GatherOptions
    ) -> TransportWork:
        source, nothing = Staged(inputs[0], is_read=True), inputs[0].new_empty(0)
        outputs = output_lists[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        given = [source if rank == opts.rootRank else Staged(nothing, is_read=True) for rank in range(self.size())]
        return self._exchange(given, [Staged(one, is_read=False) for one in outputs], outputs, opts)

    def scatter(
        self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: dist.ScatterOptions
    ) -> TransportWork:
        nothing = outputs[0].new_empty(0)
        inputs = input_lists[0] if self.rank() == opts.rootRank else [nothing] * self.size()
        taken = [Staged(outputs[0] if rank == opts.rootRank else nothing, is_read=False) for rank in range(self.size())]
        return self._exchange([Staged(one, is_read=True) for one in inputs], taken, outputs, opts)

    def _exchange(
        self,
        given: Sequence[Staged],
        taken: Sequence[Staged],
        outputs: list[torch.Tensor],
        opts: dist.AllToAllOptions | dist.GatherOptions | dist.ScatterOptions,
    ) -> TransportWork:
        if len(given) != self.size() or len(taken) != self.size():
            raise ConfigError(
                f"{len(given)} tensors are given and {len(taken)} taken", needed=f"one for each of {self.size()} ranks"
            )
        timeout_s = self._limit(opts.timeout)

        def call() -> None:
            self.transport.all_to_all([one.flat for one in given], [one.flat for one in taken], timeout_s)
            fill(taken)

        return self._start(call, outputs, opts.asyncOp)

    # Messages.

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> TransportWork:
        self._check_open()
        flat = Staged(tensors[0], is_read=True).flat
        work = TransportWork(tensors)
        self._mail.post(lambda: self.transport.send(flat, rank, tag & _TAG_MASK), work, lambda: None)
        return work

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> TransportWork:
        return self._receive(tensors, rank, tag)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> TransportWork:
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: list[torch.Tensor], rank: int | None, tag: int) -> TransportWork:
        self._check_open()
        staged, work = Staged(tensors[0], is_read=False), TransportWork(tensors)
        self._mail.post(
            lambda: self.transport.receive(staged.flat, rank, tag & _TAG_MASK), work, lambda: fill([staged])
        )
        return work

    # What PyTorch does not have.

    def empty_shared(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Allocate a tensor that peers reach where it is, so that collectives on it copy nothing. All ranks call this.

        It lives as long as the group: allocate once and reuse.

        Args:
            shape: the same on every rank.
            dtype: the same on every rank.

        Returns:
            A tensor with undefined values; ordinary memory where the ranks are not all on one host.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        found: list[torch.Tensor | None] = []
        self._start(lambda: found.append(self.transport.empty_shared(num_bytes, self._timeout_s)), [], False).wait()
        memory = found[0]
        return torch.empty(shape, dtype=dtype) if memory is None else memory.view(dtype).view(shape)

    def hand_over(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Give one rank's tensor to all of them without a copy, where it is from `empty_shared`. All ranks call this.

        The giver must not change it until all take part in another operation (a barrier, the next tensor), by which the
        others say that they have read it; they never change it.

        Args:
            x: contiguous [...], of one shape and dtype on every rank; only the giver's values count. In ordinary
                memory, or where the ranks are not all on one host, it is filled on the others, as by `broadcast`.
            src: rank in this group of the giver.

        Returns:
            On `src` x; on the others the giver's tensor, to be read, or their own x with its values.

        Raises:
            ConfigError: x is not contiguous.
        """
        if not x.is_contiguous():
            raise ConfigError(f"a tensor with strides {x.stride()} is handed over", needed="a contiguous one")
        found: list[torch.Tensor] = []
        work = self._start(lambda: found.append(self.transport.hand_over(x, src, self._timeout_s)), [x], is_async=False)
        work.wait()
        return found[0]

    def shutdown(self) -> None:
        """Leave the group; peers that still wait for this rank get an error."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self._in_order.stop(self.transport.leave)
                self._mail.stop()
                self.transport.close()

    abort = shutdown

    def _start(self, call: Callable[[], None], outputs: list[torch.Tensor], is_async: bool) -> TransportWork:
        self._check_open()
        work = TransportWork(outputs)
        self._in_order.submit(call, work, inline=not is_async)
        return work

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the process group was destroyed")

    def _limit(self, timeout: timedelta) -> float:
        """Seconds of an operation's own timeout, or the group's where it has none."""
        return timeout.total_seconds() if timeout > timedelta(0) else self._timeout_s
