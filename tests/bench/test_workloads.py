"""The workloads are what they say they are."""

from __future__ import annotations

import pytest

from martlet.bench import workloads
from martlet.errors import UsageError


def test_shapes():
    w = {name: workloads.load(name) for name in workloads.NAMES}
    assert [len(p) for p in w["W1"].prompts] == [128]
    assert [len(p) for p in w["W2"].prompts] == [1024]
    assert [(w[n].new_tokens, w[n].concurrency, w[n].size) for n in ("W1", "W2", "W3", "W4", "W5", "start")] == [
        (128, 1, 1),
        (32, 1, 1),
        (128, 16, 64),
        (64, 16, 32),
        (64, 8, 32),
        (1, 1, 1),
    ]
    lengths = [len(p) for p in w["W3"].prompts]
    assert min(lengths) >= 64 and max(lengths) <= 256 and sum(lengths) == 10456
    assert {len(p) for p in w["W4"].prompts} == {512 + 32}
    assert len({p[:512] for p in w["W4"].prompts}) == 1 and len({p[512:] for p in w["W4"].prompts}) == 32
    assert len(set(w["W5"].chats)) == 32 and not w["W5"].prompts
    for name in ("W1", "W2", "W3", "W4", "start"):
        assert len(w[name].texts) == w[name].size
        assert all(0 <= token < 49152 for prompt in w[name].prompts for token in prompt)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="no workload 'w1'; there are W1, "):
        workloads.load("w1")
