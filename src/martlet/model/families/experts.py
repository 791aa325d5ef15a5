"""Which layers of a config are mixtures of experts, and of what kind: shared by the pages of such families."""

from __future__ import annotations

from martlet.model.families.family import Config, need, read_activation
from martlet.model.spec import Experts, FeedForward


def read_mlps(config: Config, *, count: int, active: int, renormalise: bool, shared: int = 0) -> list[FeedForward]:
    """One feed-forward a layer. Dense ones where decoder_sparse_step or mlp_only_layers says so.

    count, active: of experts where the config does not say. shared: hidden size of the shared expert, which a sigmoid
    gates.
    """
    count = config.get("num_experts") or config.get("num_local_experts") or count
    active = config.get("num_experts_per_tok") or active
    experts = Experts(count, active, renormalise, shared, shared_gated=bool(shared))
    activation, dense = read_activation(config), need(config, "intermediate_size")
    sparse = FeedForward(config.get("moe_intermediate_size") or dense, activation, experts=experts)
    step, plain = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return [
        FeedForward(dense, activation) if n in plain or (n + 1) % step else sparse
        for n in range(need(config, "num_hidden_layers"))
    ]
