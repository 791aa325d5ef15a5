import queue
import threading

import pytest
from fake_runner import FakeRunner, LateRunner, expected_tokens

from martlet.engine import AsyncEngine, Engine, Request
from martlet.errors import InvalidRequest, MartletError, Overloaded
from martlet.runners.base import MemoryPlan
from martlet.sampling_params import SamplingParams

MEMORY = MemoryPlan(block_size=4, num_blocks=64, max_rows=8, max_model_len=64)


@pytest.fixture
def engine():
    engine = AsyncEngine(Engine(FakeRunner(MEMORY, lag=1)))
    yield engine
    engine.close()
    assert not engine._thread.is_alive()


def ask(name, seed=0, **params):
    return Request(name, [1, 2, 3], SamplingParams(**{"seed": seed, "max_tokens": 20, **params}), stream=True)


def collect(outbox, count):
    """Outputs until `count` requests have had their last one."""
    outputs = []
    while count:
        news = outbox.get(timeout=10)
        outputs += news
        count -= sum(o.last for o in news)
    return outputs


def test_many_threads_get_their_own_answers(engine):
    answers = {}

    def client(number):
        outbox = queue.SimpleQueue()
        engine.submit([ask(f"{number}-{i}", seed=number * 10 + i) for i in range(3)], outbox)
        for output in collect(outbox, 3):
            answers.setdefault(output.request_id, []).extend(output.token_ids)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {f"{n}-{i}": expected_tokens([1, 2, 3], n * 10 + i, 20) for n in range(6) for i in range(3)}


def test_a_step_gives_a_sink_its_news_in_one_put(engine):
    outbox = queue.SimpleQueue()
    engine.submit([ask(f"r{i}", n=1) for i in range(5)], outbox)
    sizes = []
    left = 5
    while left:
        news = outbox.get(timeout=10)
        sizes.append(len(news))
        left -= sum(o.last for o in news)
    assert max(sizes) == 5


@pytest.mark.parametrize("lag", [0, 1])
def test_news_are_told_while_a_device_computes(lag):
    told = []
    runner = FakeRunner(MEMORY, lag=lag)
    launch = runner.launch

    def launched(batch):
        told.append("launch")
        return launch(batch)

    class Sink(queue.SimpleQueue):
        def put(self, outputs):
            told.append("news")
            super().put(outputs)

    runner.launch = launched
    engine, sink = AsyncEngine(Engine(runner)), Sink()
    engine.submit([ask("a", max_tokens=4)], sink)
    collect(sink, 1)
    engine.close()
    ahead = ["launch", "launch"] + ["launch", "news"] * 2 + ["news", "news"]
    assert told == (ahead if lag else ["launch", "news"] * 4)


def test_news_of_a_step_are_told_before_the_next_one_is_waited_for():
    """Where this thread computes, too: its part of a step comes behind all that can be said of the step before."""
    told = []

    class Telling(LateRunner):
        def launch(self, batch):
            step = super().launch(batch)
            told.append("begun")
            return step

        def help(self, to_the_end):
            told.append("help")
            super().help(to_the_end)

    class Sink(queue.SimpleQueue):
        def put(self, outputs):
            told.append("news")
            super().put(outputs)

    engine, sink = AsyncEngine(Engine(Telling(MEMORY))), Sink()
    engine.submit([ask("a", max_tokens=4)], sink)
    assert [t for o in collect(sink, 1) for t in o.token_ids] == expected_tokens([1, 2, 3], 0, 4)
    engine.close()
    first = ["begun", "news"]  # as soon as it is there
    assert told == [*first, "begun", "help"] + ["begun", "news", "help"] * 2 + ["news"]


def test_a_request_that_comes_during_a_step_is_in_the_next_one():
    runner = LateRunner(MEMORY)
    engine, sink, sizes = AsyncEngine(Engine(runner)), queue.SimpleQueue(), []
    launch, help = runner.launch, runner.help

    def launched(batch):
        sizes.append(len(batch.rows))
        return launch(batch)

    def helped(to_the_end):
        if len(sizes) == 2:
            engine.submit([ask("b", max_tokens=4)], sink)
        help(to_the_end)

    runner.launch, engine.engine._help = launched, helped
    engine.submit([ask("a", max_tokens=8)], sink)
    collect(sink, 2)
    engine.close()
    assert sizes[:3] == [1, 1, 2]


def test_abort_ends_a_request_soon(engine):
    outbox = queue.SimpleQueue()
    engine.submit([ask("a", max_tokens=60)], outbox)
    outbox.get(timeout=10)
    engine.abort(["a", "unknown"])
    assert collect(outbox, 1)[-1].finish_reason in ("abort", "length")
    assert engine.stats().kv_blocks_used == 0


def test_a_bad_request_queues_none_of_its_batch(engine):
    outbox = queue.SimpleQueue()
    with pytest.raises(InvalidRequest):
        engine.submit([ask("a"), Request("b", [])], outbox)
    with pytest.raises(InvalidRequest, match="ids"):
        engine.submit([ask("a"), ask("a")], outbox)
    engine.submit([ask("a")], outbox)
    assert collect(outbox, 1)


def test_close_tells_those_who_wait():
    engine = AsyncEngine(Engine(FakeRunner(MEMORY)))
    outbox = queue.SimpleQueue()
    engine.submit([ask(f"r{i}", max_tokens=60) for i in range(30)], outbox)
    engine.close()
    reasons = {o.finish_reason for o in collect(outbox, 30) if o.last}
    assert reasons <= {"abort", "length"} and "abort" in reasons
    with pytest.raises(MartletError, match="shut down"):
        engine.submit([ask("x")], outbox)


def test_a_bug_in_the_engine_leaves_nobody_waiting():
    engine = AsyncEngine(Engine(FakeRunner(MEMORY)))
    engine.engine.collect = lambda: 1 / 0
    outbox = queue.SimpleQueue()
    engine.submit([ask("a")], outbox)
    (output,) = outbox.get(timeout=10)
    assert output.finish_reason == "error" and output.last
    engine._thread.join(10)
    assert engine.failure and engine.stats().error
    with pytest.raises(MartletError, match="died"):
        engine.submit([ask("b")], outbox)


def test_the_queue_limit_counts_what_is_on_its_way():
    from martlet.engine import EngineOptions

    engine = AsyncEngine(Engine(FakeRunner(MEMORY), options=EngineOptions(max_num_queued=2)))
    with pytest.raises(Overloaded):
        engine.submit([ask(f"r{i}") for i in range(MEMORY.max_rows + 3)], queue.SimpleQueue())
    engine.close()


def test_quiet_time_goes_to_getting_ready_and_requests_do_not_wait_for_all_of_it():
    """Pieces follow one another while nobody asks; a request is answered after the piece under way."""
    runner, sink, pieces, enough = FakeRunner(MEMORY), queue.SimpleQueue(), [], threading.Event()

    def get_ready():
        pieces.append(len(launched))
        if len(pieces) == 3:
            engine.submit([ask("a", max_tokens=4)], sink)  # comes within a piece
        if len(pieces) == 6:
            enough.set()
        return len(pieces) < 6

    launched, launch, runner.get_ready = [], runner.launch, get_ready
    runner.launch = lambda batch: launched.append(len(pieces)) or launch(batch)
    engine = AsyncEngine(Engine(runner))
    assert [t for o in collect(sink, 1) for t in o.token_ids] == expected_tokens([1, 2, 3], 0, 4)
    assert launched == [3, 3, 3, 3]
    assert enough.wait(10)
    engine.close()
    assert pieces == [0, 0, 0, 4, 4, 4]


def test_getting_ready_may_fail(caplog):
    runner, sink, tried = FakeRunner(MEMORY), queue.SimpleQueue(), threading.Event()

    def get_ready():
        tried.set()
        raise RuntimeError("no room for it")

    runner.get_ready = get_ready
    engine = AsyncEngine(Engine(runner))
    assert tried.wait(10)
    engine.submit([ask("a", max_tokens=4)], sink)
    assert [t for o in collect(sink, 1) for t in o.token_ids] == expected_tokens([1, 2, 3], 0, 4)
    engine.close()
    assert "no room for it" in caplog.text
