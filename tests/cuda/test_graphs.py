"""Which graphs are captured ahead; capturing itself needs a GPU (bench/gpu/check.py)."""

from types import SimpleNamespace

from martlet.runners.cuda_runner.graphs import LAUNCHES_MS, Graphs, ladder
from martlet.runners.cuda_runner.mixed import Mixed


def test_quiet_time_captures_the_ladder_of_each_kind_short_prompts_and_what_was_seen_before():
    graphs, captured = object.__new__(Graphs), []
    long, late = Mixed(24, 1024, 64), Mixed(24, 128, 64)
    graphs.decoder, graphs.ms_a_token = SimpleNamespace(queries=64), LAUNCHES_MS / 128
    graphs.sizes, graphs.decodes, graphs.seen = ladder(24), [0, 16, 24], {long: None, late: None}
    graphs.captured = dict.fromkeys([(8, "greedy", False), (1, "greedy", False), (16, "draw", False)])

    def capture(key):
        captured.append(key)
        graphs.captured[key] = None

    graphs._graph = capture
    while graphs.capture_next():
        pass
    short = {decodes: [Mixed(decodes, tokens, 64) for tokens in (64, 128)] for decodes in graphs.decodes}
    assert captured == [
        late, *short[0], (1, "draw", False), (8, "draw", False), (16, "greedy", False), *short[16],
        (24, "greedy", False), (24, "draw", False), short[24][0], long,
    ]  # fmt: skip
    assert not graphs.capture_next() and captured[-1] == long


def test_a_step_waits_for_a_short_graph_that_is_wanted_twice_and_never_for_a_long_one():
    graphs = object.__new__(Graphs)
    graphs.decoder, graphs.ms_a_token = SimpleNamespace(queries=64), LAUNCHES_MS / 128
    graphs.decodes, graphs.seen, graphs.captured = [0, 16], {}, {}
    for tokens, waits in ((128, True), (1024, False), (300, False)):
        assert graphs.mixed_for(3, tokens, 2) is None
        assert (graphs.mixed_for(3, tokens, 2) is not None) == waits
    graphs.captured = dict.fromkeys(graphs.seen)
    assert graphs.mixed_for(3, 1024, 2) == Mixed(16, 1024, 64)
    assert graphs.mixed_for(3, 300, 2) is None  # 212 tokens of padding would cost more than launches
