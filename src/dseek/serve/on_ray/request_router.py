"""`AffinityRequestRouter`: Ray Serve's choice of a replica, by who has computed a prompt's beginning and by load.

Ray Serve makes one in each process that holds a handle. It knows the requests that this process has sent; of those of
other processes it learns from the lengths of queues that replicas tell. The interface is marked alpha in Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from dseek.serve.affinity import Affinity


class AffinityRequestRouter(RequestRouter):
    """Chooses like the router over local workers: see `Affinity`."""

    num_hits: ClassVar[int] = 0
    """Requests of this process that went where their beginning was known."""

    def initialize_state(self, **options: Any) -> None:
        """Begin; called by Ray Serve.

        Args:
            options: none are known.
        """
        self._affinity: Affinity[str] = Affinity()
        self._in_work: dict[str, set[str]] = defaultdict(set)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for a request; called by Ray Serve.

        Args:
            candidate_replicas: those that live.
            pending_request: its argument `hashes` is of the prompt's beginning.

        Returns:
            The chosen one, then all, of which Ray Serve takes the least busy where the first does not answer.
        """
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not by_id:
            return []
        loads = {name: self._load(replica) for name, replica in by_id.items()}
        before = self._affinity.num_hits
        chosen = self._affinity.choose(_hashes(pending_request), loads)
        type(self).num_hits += self._affinity.num_hits - before
        return [[by_id[chosen]], candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note where a request went; called by Ray Serve.

        Args:
            pending_request: the request.
            replica_id: where it went, which is not where it was to go if that one did not answer.
            result: not used.
        """
        self._affinity.learn(_hashes(pending_request), replica_id.unique_id)
        self._in_work[replica_id.unique_id].add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request has ended; called by Ray Serve.

        Args:
            replica_id: where it was.
            internal_request_id: which one.
        """
        self._in_work[replica_id.unique_id].discard(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica; called by Ray Serve.

        Args:
            replica_id: the one that died.
        """
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id.unique_id)
        self._in_work.pop(replica_id.unique_id, None)

    def _load(self, replica: RunningReplica) -> int:
        """Requests that a replica has in work, as far as is known here."""
        told = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(told, len(self._in_work.get(replica.replica_id.unique_id, ())))


def _hashes(request: PendingRequest | None) -> Sequence[bytes]:
    found: Sequence[bytes] = () if request is None else request.kwargs.get("hashes", ())
    return found
