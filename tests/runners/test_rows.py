"""Row state: what the engine sends becomes flat arrays."""

import numpy as np

from martlet.runners.base import Batch, MemoryPlan, NewRow
from martlet.runners.rows import Rows
from martlet.sampling_params import SamplingParams

MEMORY = MemoryPlan(block_size=4, num_blocks=50, max_rows=4, max_model_len=30)


def batch(rows, start, count, **rest) -> Batch:
    return Batch(*(np.array(a, np.int32) for a in (rows, start, count)), np.ones(len(rows), bool), **rest)


def enter(row: int, tokens, prompt_len=None, seed=0, end_ids=(), **params) -> NewRow:
    tokens = np.array(tokens, np.int32)
    return NewRow(row, tokens, prompt_len or len(tokens), SamplingParams(**params), seed, end_ids)


def test_layout():
    rows = Rows(MEMORY, 100)
    new = [enter(2, range(50, 60)), enter(0, [7, 8])]
    writes = {"block_rows": [2, 2, 2, 0], "block_slots": [0, 1, 2, 0], "block_ids": [9, 3, 20, 30]}
    step = batch([2, 0], [3, 0], [6, 2], new_rows=new, **{k: np.array(v, np.int32) for k, v in writes.items()})
    rows.apply(step)
    layout, tokens = rows.layout(step)
    assert tokens.tolist() == [53, 54, 55, 56, 57, 58, 7, 8]
    assert layout.positions.tolist() == [3, 4, 5, 6, 7, 8, 0, 1]
    assert layout.slots.tolist() == [39, 12, 13, 14, 15, 80, 120, 121]
    assert layout.blocks.shape == (2, 3) and layout.blocks[0].tolist() == [9, 3, 20]
    assert (layout.start.tolist(), layout.count.tolist(), layout.block_size) == ([3, 0], [6, 2], 4)


def test_a_plain_row_has_no_extras():
    rows = Rows(MEMORY, 100)
    rows.apply(batch([], [], [], new_rows=[enter(1, [1, 2], seed=2**64 - 1, temperature=0.5, top_k=500, top_p=0.25)]))
    found = rows.sampling(np.array([1]), np.array([2]))
    assert (found.temperature[0], found.top_k[0], found.top_p[0], found.seed[0]) == (0.5, 0, 0.25, 2**64 - 1)
    assert found.penalties is found.bias is found.banned is found.allowed is None


def test_extras_of_some_rows():
    rows = Rows(MEMORY, 100)
    new = [
        enter(0, [1, 2], logit_bias={5: 1.5, 6: -2}, allowed_token_ids=[5, 6, 7]),
        enter(1, [3], min_tokens=2, end_ids=(90, 91)),
        enter(3, [4, 5, 4, 9], prompt_len=3, presence_penalty=0.5, repetition_penalty=1.25),
    ]
    rows.apply(batch([], [], [], new_rows=new))
    found = rows.sampling(np.array([3, 1, 0]), np.array([4, 2, 2]))
    assert [a.tolist() for a in found.bias] == [[2, 2], [5, 6], [1.5, -2]]
    assert [a.tolist() for a in found.allowed] == [[2, 2, 2], [5, 6, 7]]
    assert [a.tolist() for a in found.banned] == [[1, 1], [90, 91]]
    assert found.penalties.rows.tolist() == [0] and found.penalties.prompt_len.tolist() == [3]
    assert found.penalties.tokens.tolist() == [[4, 5, 4, 9]]
    assert (found.penalties.presence[0], found.penalties.repetition[0]) == (0.5, 1.25)
    assert rows.sampling(np.array([1]), np.array([3])).banned is None  # two tokens are out


def test_the_next_sequence_of_a_row_inherits_nothing():
    rows = Rows(MEMORY, 100)
    new = enter(0, [1], logit_bias={5: 1}, allowed_token_ids=[5], min_tokens=3, end_ids=(2,), frequency_penalty=1)
    rows.apply(batch([], [], [], new_rows=[new]))
    rows.apply(batch([], [], [], new_rows=[enter(0, [1])]))
    found = rows.sampling(np.array([0]), np.array([1]))
    assert found.penalties is found.bias is found.banned is found.allowed is None
