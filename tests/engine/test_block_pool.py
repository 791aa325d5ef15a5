import numpy as np

from martlet.engine.block_pool import BlockPool, chain_digest, root_digest


def digests(tokens, size=2, adapter=None, salt=None):
    chain, parent = [], root_digest(adapter, salt)
    for first in range(0, len(tokens) - size + 1, size):
        parent = chain_digest(parent, np.array(tokens[first : first + size], np.int32))
        chain.append(parent)
    return chain


def filled(pool, tokens):
    blocks = pool.take(len(tokens) // 2)
    for block, digest in zip(blocks, digests(tokens), strict=True):
        pool.register(block, digest)
    return blocks


def test_a_prefix_is_found_as_far_as_it_agrees():
    pool = BlockPool(8)
    blocks = filled(pool, [1, 2, 3, 4, 5, 6])
    assert pool.find(digests([1, 2, 3, 4, 9, 9])) == blocks[:2]
    assert pool.find(digests([9, 9, 3, 4, 5, 6])) == []


def test_salts_and_adapters_never_share():
    pool = BlockPool(8)
    filled(pool, [1, 2, 3, 4])
    assert pool.find(digests([1, 2, 3, 4], salt="s")) == []
    assert pool.find(digests([1, 2, 3, 4], adapter="a")) == []


def test_free_blocks_keep_their_content_until_reused_tail_first():
    pool = BlockPool(3)
    blocks = filled(pool, [1, 2, 3, 4, 5, 6])
    pool.release(blocks)
    assert pool.num_free == 3 and pool.find(digests([1, 2, 3, 4, 5, 6])) == blocks
    assert pool.take(1) == [blocks[-1]]
    assert pool.find(digests([1, 2, 3, 4, 5, 6])) == blocks[:2]


def test_a_found_block_comes_back_to_life():
    pool = BlockPool(2)
    blocks = filled(pool, [1, 2, 3, 4])
    pool.release(blocks)
    pool.share(blocks)
    assert pool.num_free == 0
    pool.check([blocks])


def test_content_nobody_can_find_is_reused_before_content_somebody_can():
    pool = BlockPool(4)
    known, unknown = filled(pool, [1, 2]), pool.take(1)
    pool.release(known)
    pool.release(unknown)
    assert pool.take(1) == unknown
