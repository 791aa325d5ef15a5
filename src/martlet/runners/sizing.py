"""How much memory a runner takes for sequences, from what is really free."""

from __future__ import annotations

import logging

from martlet.errors import OutOfMemory, UsageError
from martlet.model.spec import DecoderSpec
from martlet.runners.base import KV_DTYPES, LoadOptions, MemoryPlan

log = logging.getLogger("martlet")

SNAPSHOT_BLOCKS = 4  # a recurrence keeps a snapshot behind so many of the blocks that attention would have
SNAPSHOTS_A_ROW = 8  # as the default: what prompts of some hundred tokens leave behind


def kv_dtype(options: LoadOptions, runner: str, *offered: str) -> str:
    """options.kv_dtype, if `runner` has it: "auto" or one of `offered`. Raises UsageError."""
    asked = options.kv_dtype
    if asked == "auto" or asked in offered:
        return asked
    if asked not in KV_DTYPES:
        raise UsageError(f"kv_cache_dtype {asked!r} is none of {', '.join(KV_DTYPES)}", param="kv_cache_dtype")
    raise UsageError(
        f"kv_cache_dtype {asked!r}: {runner} keeps keys and values as {' or '.join(('auto', *offered))}",
        param="kv_cache_dtype",
    )


def plan_memory(
    spec: DecoderSpec,
    options: LoadOptions,
    *,
    free: int,
    weights: int,
    element_size: int,
    default_rows: int,
    scale_size: int = 0,
) -> MemoryPlan:
    """Blocks for at most max_num_seqs sequences of max_model_len tokens, within memory_utilization of `free` bytes.

    free: bytes left after the weights. weights: bytes they take. element_size: bytes of one number in the cache.
    scale_size: of the scale beside each key and each value of a head, where there is one. Where not one sequence of
    max_model_len fits, max_model_len is cut and a warning says so; where not one block fits, OutOfMemory. Says in one
    log line what it came to.
    """
    rows = default_rows if options.max_num_seqs is None else options.max_num_seqs
    longest = spec.max_positions if options.max_model_len is None else options.max_model_len
    if rows < 1:
        raise UsageError(f"max_num_seqs must be at least 1, got {rows}", param="max_num_seqs")
    if options.block_size < 1:
        raise UsageError(f"block_size must be at least 1, got {options.block_size}", param="block_size")
    if not 1 <= longest <= spec.max_positions:
        raise UsageError(f"max_model_len {longest}: this model takes 1 to {spec.max_positions}", param="max_model_len")
    if not 0 < options.memory_utilization <= 1:
        raise UsageError(
            f"memory_utilization must be above 0 and at most 1, got {options.memory_utilization}",
            param="memory_utilization",
        )
    if spec.recurrent:
        return _plan_states(spec, options, rows, longest, int(free * options.memory_utilization), weights)
    scales = scale_size * sum(2 * layer.mixer.kv_heads for layer in spec.layers)
    block, per_token = options.block_size, spec.kv_elements_per_token * element_size + scales
    fit = int(free * options.memory_utilization) // (per_token * block)
    if options.kv_cache_tokens is not None:
        want = options.kv_cache_tokens // block
        if want < 1:
            raise UsageError(
                f"kv_cache_tokens {options.kv_cache_tokens} is less than a block of {block}", param="kv_cache_tokens"
            )
        if want > fit:
            raise OutOfMemory(
                f"kv_cache_tokens {options.kv_cache_tokens} needs {size(want * block * per_token)}, but of the "
                f"{size(free)} free {size(free * options.memory_utilization)} may be used; --kv_cache_tokens "
                f"{fit * block} fits",
                param="kv_cache_tokens",
            )
        blocks = want
    else:
        blocks = min(rows * -(-longest // block), fit)
    if blocks < 1:
        raise OutOfMemory(
            f"no room for the KV cache: weights take {size(weights)}, {size(free)} are free, and one block of {block} "
            f"tokens takes {size(block * per_token)}; a smaller model or a smaller --dtype would fit"
        )
    if blocks * block < longest:
        log.warning(
            "KV memory holds %d tokens, so max_model_len goes from %d to that; --kv_cache_tokens or "
            "--memory_utilization gives more",
            blocks * block,
            longest,
        )
        longest = blocks * block
    log.info(
        "weights %s, KV %s = %d tokens, %.4g requests at full length (%d tokens)",
        size(weights),
        size(blocks * block * per_token),
        blocks * block,
        blocks / -(-longest // block),
        longest,
    )
    return MemoryPlan(block, blocks, rows, longest, per_token)


def _plan_states(
    spec: DecoderSpec, options: LoadOptions, rows: int, longest: int, budget: int, weights: int
) -> MemoryPlan:
    """States of `rows` sequences and snapshots within `budget` bytes; kv_cache_tokens counts what these cover."""
    state, block = 4 * spec.state_size, options.block_size * SNAPSHOT_BLOCKS
    fit = budget // state - rows
    blocks = min(rows * SNAPSHOTS_A_ROW, fit) if options.kv_cache_tokens is None else options.kv_cache_tokens // block
    if fit < 0:
        raise OutOfMemory(
            f"no room for the states of {rows} sequences: each takes {size(state)}, weights take {size(weights)}, and "
            f"{size(budget)} may be used; --max_num_seqs {budget // state} fits",
            param="max_num_seqs",
        )
    if blocks > fit:
        raise OutOfMemory(
            f"kv_cache_tokens {options.kv_cache_tokens} needs {size(blocks * state)} for snapshots of states, one "
            f"every {block} tokens; --kv_cache_tokens {fit * block} fits",
            param="kv_cache_tokens",
        )
    log.info(
        "weights %s, %d states of %s whatever the length, %d snapshots for reuse, one every %d tokens",
        size(weights),
        rows,
        size(state),
        blocks,
        block,
    )
    return MemoryPlan(block, blocks, rows, longest, snapshots=True)


def size(count: float) -> str:
    """Bytes for people: '98.4 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
