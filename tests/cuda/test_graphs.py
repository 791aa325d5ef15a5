"""Which graphs are captured ahead; capturing itself needs a GPU (bench/gpu/check.py)."""

from martlet.runners.cuda_runner.graphs import Graphs, ladder
from martlet.runners.cuda_runner.mixed import Mixed


def test_quiet_time_captures_the_ladder_of_each_kind_and_what_was_seen_once():
    graphs = object.__new__(Graphs)
    mixed = Mixed(16, 128, 64)
    graphs.sizes, graphs.seen, captured = ladder(24), {mixed}, []
    graphs.captured = dict.fromkeys([(8, "greedy", False), (1, "greedy", False), (16, "draw", False)])

    def capture(key):
        captured.append(key)
        graphs.captured[key] = None

    graphs._graph = capture
    while graphs.capture_next():
        pass
    assert captured == [
        (16, "greedy", False), (24, "greedy", False),
        (1, "draw", False), (8, "draw", False), (24, "draw", False),
        mixed,
    ]  # fmt: skip
    assert not graphs.capture_next() and len(captured) == 6
