"""Which graphs are captured ahead; capturing itself needs a GPU (bench/gpu/check.py)."""

from itertools import pairwise
from types import SimpleNamespace

from martlet.runners.cuda_runner.graphs import CAPTURE_MS, LAUNCHES_MS, PADDING_MS, Graphs, ladder, rungs
from martlet.runners.cuda_runner.mixed import Mixed

RUNGS = [64, 128, 512, 1024]


def graphs_of(sizes: list[int], decodes: list[int], ms_a_token: float) -> Graphs:
    """Graphs of nothing, that note what would be captured."""
    graphs = object.__new__(Graphs)
    graphs.decoder, graphs.ms_a_token, graphs.rungs = SimpleNamespace(queries=64), ms_a_token, RUNGS
    graphs.sizes, graphs.decodes, graphs.missed, graphs.captured = sizes, decodes, {}, {}
    graphs._graph = lambda key: graphs.captured.setdefault(key)
    return graphs


def test_quiet_time_captures_what_was_missed_then_the_ladder_of_each_kind_and_prompts():
    graphs = graphs_of(ladder(24), [0, 16, 24], LAUNCHES_MS / 129)
    there = [(8, "greedy", False), (1, "greedy", False), (16, "draw", False)]
    long, short = Mixed(24, 1024, 64), Mixed(24, 128, 64)
    graphs.captured, graphs.missed = dict.fromkeys(there), {long: 0.0, short: 1.0}
    while graphs.capture_next():
        pass
    steps = {decodes: [Mixed(decodes, tokens, 64) for tokens in RUNGS] for decodes in graphs.decodes}
    assert list(graphs.captured)[len(there) :] == [
        short, long, *steps[0], (1, "draw", False), (8, "draw", False), (16, "greedy", False), *steps[16],
        (24, "greedy", False), (24, "draw", False), steps[24][0], steps[24][2],
    ]  # fmt: skip
    assert not graphs.capture_next()


def test_a_step_waits_for_its_graph_when_as_much_was_lost_without_and_never_for_a_long_one():
    graphs = graphs_of(ladder(24), [0, 16], LAUNCHES_MS / 256)
    times = 0
    while graphs.mixed_for(3, 100, 2) is None:
        times += 1
    saved = LAUNCHES_MS / 2  # by a graph of 128 tokens
    assert times * saved <= CAPTURE_MS < (times + 1) * saved
    assert all(graphs.mixed_for(3, 1000, 2) is None for _ in range(100))
    graphs.captured = dict.fromkeys(graphs.missed)
    assert graphs.mixed_for(3, 1000, 2) == Mixed(16, 1024, 64)
    assert graphs.mixed_for(3, 300, 2) is None, "212 tokens of padding take longer than launches"


def test_no_step_that_may_be_a_graph_is_padded_for_longer_than_it_may_be():
    for ms in (0.001, 0.0058, 0.006, 0.02, 0.0234):
        sizes = rungs(ms)
        assert sizes == sorted(sizes) and sizes[-1] == 2048
        assert max(b - a - 1 for a, b in pairwise(sizes)) * ms <= PADDING_MS
