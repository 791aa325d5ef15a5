"""The operation table in torch: what every other implementation is tested against, and good enough to serve on."""

from __future__ import annotations

from martlet.kernels.reference import attention, experts, layers, logprobs, lora, recurrence, rotary, sampling

__all__ = ["ReferenceOps"]


class ReferenceOps:
    """See martlet.kernels.ops.Ops for shapes and meaning."""

    pack = staticmethod(layers.pack)
    linear = staticmethod(layers.linear)
    lora = staticmethod(lora.lora)
    embedding = staticmethod(layers.embedding)
    rms_norm = staticmethod(layers.rms_norm)
    add_rms_norm = staticmethod(layers.add_rms_norm)
    layer_norm = staticmethod(layers.layer_norm)
    add_layer_norm = staticmethod(layers.add_layer_norm)
    activation = staticmethod(layers.activation)
    experts = staticmethod(experts.experts)
    logits = staticmethod(layers.logits)
    rotation = staticmethod(rotary.rotation)
    rotate_and_write = staticmethod(rotary.rotate_and_write)
    plan = staticmethod(attention.plan)
    paged_attention = staticmethod(attention.paged_attention)
    copy_blocks = staticmethod(attention.copy_blocks)
    recurrence_plan = staticmethod(recurrence.recurrence_plan)
    token_shift = staticmethod(recurrence.token_shift)
    wkv = staticmethod(recurrence.wkv)
    delta_rule = staticmethod(recurrence.delta_rule)
    head_norm = staticmethod(recurrence.head_norm)
    sample = staticmethod(sampling.sample)
    logprobs = staticmethod(logprobs.logprobs)
