"""KV memory from what is free: the numbers, the cuts and the refusals."""

import logging

import pytest

from martlet.errors import OutOfMemory, UsageError
from martlet.model import families
from martlet.runners.base import LoadOptions, MemoryPlan
from martlet.runners.machine import free_memory, usable_cores
from martlet.runners.sizing import plan_memory, size

SPEC = families.get("llama").read(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 1000,
    }
)
PER_TOKEN = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head size, bytes


def plan(free: int, **options) -> MemoryPlan:
    return plan_memory(SPEC, LoadOptions(**options), free=free, weights=12345, element_size=2, default_rows=8)


def test_no_more_than_all_rows_can_use(caplog):
    caplog.set_level(logging.INFO, "martlet")
    memory = plan(1 << 40)
    assert memory == MemoryPlan(16, 8 * 63, 8, 1000, PER_TOKEN)
    assert "weights 12.1 KiB, KV 1.97 MiB = 8064 tokens, 8 requests at full length (1000 tokens)" in caplog.text
    assert plan(1 << 40, max_num_seqs=3, max_model_len=100, block_size=32).num_blocks == 3 * 4


def test_no_more_than_its_share_of_what_is_free():
    assert plan(PER_TOKEN * 4000).num_blocks == 3600 // 16
    assert plan(PER_TOKEN * 4000, memory_utilization=0.5).num_blocks == 2000 // 16
    assert plan(PER_TOKEN * 4000, kv_cache_tokens=3000).num_blocks == 3000 // 16


def test_one_long_sequence_is_cut_to_what_fits(caplog):
    memory = plan(PER_TOKEN * 400, memory_utilization=1.0)
    assert (memory.num_blocks, memory.max_model_len) == (25, 400)
    assert "max_model_len" in caplog.text and "--kv_cache_tokens" in caplog.text
    assert plan(1 << 30, kv_cache_tokens=64).max_model_len == 64


def test_nothing_fits():
    with pytest.raises(OutOfMemory, match=r"weights take 12\.1 KiB, 2\.44 KiB are free.*16 tokens takes 4 KiB"):
        plan(2500)


def test_too_large_a_wish_names_the_flag_that_works():
    with pytest.raises(OutOfMemory, match="--kv_cache_tokens 3600 fits") as caught:
        plan(PER_TOKEN * 4000, kv_cache_tokens=5000)
    assert caught.value.param == "kv_cache_tokens"
    assert plan(PER_TOKEN * 4000, kv_cache_tokens=3600).num_blocks == 225


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_model_len", 1001),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("block_size", 0),
        ("memory_utilization", 0.0),
        ("memory_utilization", 1.1),
        ("kv_cache_tokens", 15),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(UsageError, match=str(value)) as caught:
        plan(1 << 30, **{option: value})
    assert caught.value.param == option


def test_sizes_for_people():
    assert [size(n) for n in (5, 2048, 3.5 * 2**20, 2**30, 2**41)] == ["5 B", "2 KiB", "3.5 MiB", "1 GiB", "2048 GiB"]


def test_this_machine():
    assert usable_cores() >= 1
    assert free_memory() > 1 << 20


RWKV = families.get("rwkv5").read(families.example("rwkv5"))
STATE = 2 * 4 * (2 * 64 + 64 * 16)  # layers, bytes, two last inputs and a matrix a head


def plan_states(free: int, **options) -> MemoryPlan:
    return plan_memory(RWKV, LoadOptions(**options), free=free, weights=12345, element_size=2, default_rows=8)


def test_a_recurrence_has_a_state_a_row_and_snapshots(caplog):
    caplog.set_level(logging.INFO, "martlet")
    memory = plan_states(1 << 40)
    assert memory == MemoryPlan(64, 8 * 8, 8, 1 << 18, snapshots=True) and memory.longest == 1 << 18
    assert f"8 states of {size(STATE)} whatever the length, 64 snapshots for reuse, one every 64 tokens" in caplog.text
    assert plan_states(1 << 40, max_model_len=20000, kv_cache_tokens=640) == MemoryPlan(
        64, 10, 8, 20000, snapshots=True
    )
    assert plan_states(STATE * 20, memory_utilization=0.5).num_blocks == 2
    assert plan_states(STATE * 8, memory_utilization=1.0).num_blocks == 0  # snapshots are a convenience


def test_states_that_do_not_fit_are_refused_with_what_would():
    with pytest.raises(OutOfMemory, match=r"states of 8 sequences.*--max_num_seqs 4 fits"):
        plan_states(STATE * 4, memory_utilization=1.0)
    with pytest.raises(OutOfMemory, match=r"--kv_cache_tokens 128 fits"):
        plan_states(STATE * 10, memory_utilization=1.0, kv_cache_tokens=6400)
