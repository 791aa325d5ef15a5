"""Our routing policy as Ray Serve asks for it: Ray makes one, by the path of its class, in the process of the front."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from martlet.server.affinity import Affinity


class AffinityRouter(RequestRouter):
    def initialize_state(self, **kwargs: int) -> None:
        self.policy = Affinity(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        found = {replica.replica_id: replica for replica in candidate_replicas}
        digests = pending_request.args[0].digests if pending_request is not None else ()
        ranked = self.policy.rank(digests, sorted(found, key=str))
        if pending_request is not None and ranked:  # counted now: requests that come at once must see each other
            request = pending_request.metadata.internal_request_id
            self.policy.began(request, ranked[0], digests)
            pending_request.future.add_done_callback(lambda future: future.cancelled() and self.policy.ended(request))
        return [[found[name]] for name in ranked]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.policy.ended(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.policy.keep(list(self.curr_replicas))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self.policy.keep(list(self.curr_replicas))
