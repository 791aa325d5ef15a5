"""What requests get from the engine, on the fake network."""

import numpy as np
import pytest
from byte_tokenizer import EOS, ByteTokenizer
from fake_runner import VOCAB, FakeRunner, LateRunner, expected_tokens
from toy_grammar import END, constraints

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import InvalidRequest, Overloaded
from martlet.grammar import Grammar
from martlet.runners.base import Done, MemoryPlan, StepResult
from martlet.sampling_params import SamplingParams

MEMORY = MemoryPlan(block_size=4, num_blocks=32, max_rows=4, max_model_len=64)


def make(lag=0, **options) -> Engine:
    return Engine(FakeRunner(MEMORY, lag=lag), options=EngineOptions(seed=1, **options))


def ask(name="r", prompt=(1, 2, 3), stream=False, priority=0, **params) -> Request:
    return Request(name, list(prompt), SamplingParams(**{"seed": 7, **params}), priority=priority, stream=stream)


class Scripted(FakeRunner):
    """Answers every request with the bytes of a text, then the end token."""

    vocab_size = ByteTokenizer.vocab_size

    def __init__(self, text: str, prompt_len: int):
        super().__init__(MEMORY)
        self.script, self.prompt_len = [*text.encode(), EOS], prompt_len

    def launch(self, batch):
        position = batch.start + batch.count - self.prompt_len
        tokens = [self.script[p] if s else -1 for p, s in zip(position, batch.sample, strict=True)]
        return Done(StepResult(np.array(tokens, np.int32)))


def answer(text, **params):
    engine = Engine(Scripted(text, 3), ByteTokenizer())
    outputs = drain(engine, [Request("r", [1, 2, 3], SamplingParams(**{"max_tokens": 50, **params}), stream=True)])
    assert [o.last for o in outputs] == [False] * (len(outputs) - 1) + [True]
    return "".join(o.text for o in outputs), [t for o in outputs for t in o.token_ids], outputs[-1]


def test_the_end_token_is_given_but_not_its_text():
    text, tokens, last = answer("héllo 🙂")
    assert text == "héllo 🙂" and tokens[-1] == EOS
    assert last.finish_reason == "stop" and last.stop_reason is None


def test_a_stop_string_ends_the_answer_and_is_named():
    text, tokens, last = answer("one two three", stop=["two"])
    assert text == "one " and last.stop_reason == "two" and bytes(tokens) == b"one two"
    assert answer("one two three", stop=["two"], include_stop_str_in_output=True)[0] == "one two"


def test_a_stop_token_is_named():
    text, _, last = answer("abc", stop_token_ids=[ord("c")])
    assert text == "ab" and last.stop_reason == ord("c") and last.finish_reason == "stop"


def test_length_ends_the_answer_and_an_unfinished_character_is_replaced():
    text, tokens, last = answer("a🙂", max_tokens=3)
    assert text == "a�" and len(tokens) == 3 and last.finish_reason == "length"


def test_ignore_eos_goes_on():
    engine = Engine(Scripted("ab" + "\0" * 40, 3), ByteTokenizer())
    engine.runner.script[2] = EOS
    (output,) = drain(engine, [Request("r", [1, 2, 3], SamplingParams(ignore_eos=True, max_tokens=6))])
    assert output.token_ids == [97, 98, EOS, 0, 0, 0] and output.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
def test_outputs_add_up_to_the_answer(stream, lag):
    outputs = drain(make(lag), [ask(max_tokens=9, stream=stream, n=2)])
    for index in range(2):
        mine = [o for o in outputs if o.index == index]
        assert [t for o in mine for t in o.token_ids] == expected_tokens([1, 2, 3], 7 + index, 9)
        assert len(mine) == (9 if stream else 1)


def test_lower_priority_numbers_run_first():
    engine = make()
    requests = [ask(f"r{i}", priority=p, max_tokens=20) for i, p in enumerate((3, 2, 1, 0, 0, -1))]
    outputs = drain(engine, requests)
    assert [o.request_id for o in outputs] == ["r5", "r3", "r4", "r2", "r1", "r0"]


def test_prefix_hits_are_counted_and_cost_nothing():
    engine = make()
    drain(engine, [ask("a", range(20), max_tokens=1)])
    before = engine.runner.tokens_computed
    (output,) = drain(engine, [ask("b", [*range(20), 50], max_tokens=1)])
    assert output.cached_tokens == 20 and engine.runner.tokens_computed - before == 1
    assert engine.stats().prefix_hits == 20


def test_a_request_never_pays_for_prefix_caching_switched_off():
    engine = make(enable_prefix_caching=False)
    drain(engine, [ask("a", range(20), max_tokens=1)])
    (output,) = drain(engine, [ask("b", range(20), max_tokens=1)])
    assert output.cached_tokens == 0


def test_n_answers_share_the_blocks_of_the_prompt():
    engine = make()
    engine.add(ask(prompt=range(40), n=4, max_tokens=8, stream=True))
    used = []
    while engine.has_work:
        engine.step()
        used.append(engine.stats().kv_blocks_used)
    assert max(used) == 9 + 4 * (1 + 2)  # nine prompt blocks once; the block of the last prompt token and two more each
    assert engine.runner.tokens_computed == 40 + 3 + 4 * 7


def test_abort_frees_everything_at_once():
    engine = make(lag=1)
    engine.add(ask(n=3, max_tokens=30, stream=True))
    for _ in range(4):
        engine.step()
    engine.abort("r")
    assert engine.stats().kv_blocks_used == 0
    outputs = engine.step()
    assert {o.finish_reason for o in outputs} == {"abort"} and [o.last for o in outputs].count(True) == 1
    engine.abort("r")
    assert engine.step() == [] and not engine.has_work


def test_a_failing_step_fails_its_requests_and_no_others():
    engine = make()
    engine.add(ask("a", max_tokens=30))
    engine.step()
    engine.runner.fail_next = True
    (output,) = engine.step()
    assert output.finish_reason == "error" and "injected" in str(output.error)
    (output,) = drain(engine, [ask("b", max_tokens=3)])
    assert output.token_ids == expected_tokens([1, 2, 3], 7, 3) and engine.stats().error is None


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("at", [0, 3])
def test_a_poisoned_request_hurts_only_itself(lag, at):
    """It comes with others, or joins them later; they give what they give alone, streams without a gap."""
    engine = make(lag)
    engine.runner.poison = 9
    good = {f"g{i}": (5, i, i) for i in range(3)}
    for name, prompt in good.items():
        engine.add(ask(name, prompt, stream=True, max_tokens=10))
    outputs = [output for _ in range(at) for output in engine.step()]
    outputs += drain(engine, [ask("poisoned", (9, 1), max_tokens=10)])
    ends = {o.request_id: o for o in outputs if o.last}
    assert ends["poisoned"].finish_reason == "error" and "poison" in str(ends["poisoned"].error)
    for name, prompt in good.items():
        assert ends[name].finish_reason == "length"
        tokens = [t for o in outputs if o.request_id == name for t in o.token_ids]
        assert tokens == expected_tokens(list(prompt), 7, 10)
    assert engine.stats().kv_blocks_used == 0 and engine.stats().error is None


def test_a_step_that_fails_once_fails_nobody_in_company():
    engine = make()
    requests = [ask(f"r{i}", (5, i), max_tokens=6) for i in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    engine.runner.fail_next = True
    outputs = drain(engine, [])
    assert {o.finish_reason for o in outputs} == {"length"} and len(outputs) == 3


def test_an_engine_that_only_fails_says_so():
    engine = make()
    for i in range(3):
        engine.runner.fail_next = True
        drain(engine, [ask(f"r{i}")])
    assert "3 steps" in engine.stats().error


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (ask(prompt=[]), "prompt", "empty"),
        (ask(prompt=range(64)), "prompt", "64 tokens"),
        (ask(prompt=[VOCAB]), "prompt", f"0 to {VOCAB - 1}"),
        (ask(prompt=[-1]), "prompt", "0 to"),
        (ask(stop_token_ids=[VOCAB]), "stop_token_ids", str(VOCAB)),
        (ask(stop="x"), "stop", "tokenizer"),
    ],
)
def test_requests_that_can_never_run_are_refused_by_name(request_, param, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        make().add(request_)
    assert caught.value.param == param


def test_a_full_queue_refuses_more_and_a_burst_at_free_rows_is_no_queue():
    engine = make(max_num_queued=2)
    room = engine.runner.memory.max_rows + 2
    for number in range(room):
        engine.add(ask(f"r{number}"))
    with pytest.raises(Overloaded, match="2 requests may wait"):
        engine.add(ask("one more"))
    engine.step()  # rows are taken now: what waits is the line itself
    with pytest.raises(Overloaded, match=f"and {len(engine.scheduler.waiting)} do"):
        engine.add(ask("one more"))


def test_an_id_in_use_is_refused():
    engine = make()
    engine.add(ask("a"))
    with pytest.raises(InvalidRequest, match="'a' is running"):
        engine.add(ask("a"))


class Guessed(Scripted):
    """Verifies guesses against its script."""

    max_drafts, steps = 8, 0

    def launch(self, batch):
        self.steps += 1
        if batch.drafts is None:
            return super().launch(batch)
        first = int(batch.start[0]) + 1 - self.prompt_len
        script = np.array((self.script + [EOS] * 9)[first : first + 1 + batch.drafts.shape[1]], np.int32)
        right = np.cumprod(script[:-1] == batch.drafts[0])
        return Done(StepResult(np.where(np.append(True, right), script, -1)[None]))


def test_right_guesses_save_steps_and_change_nothing():
    engine = Engine(Guessed("abcdabcdabcdabcdabcdabce", 3), ByteTokenizer(), EngineOptions(speculative_tokens=4))
    (output,) = drain(engine, [Request("r", [1, 2, 3], SamplingParams(max_tokens=50))])
    assert output.text == "abcdabcdabcdabcdabcdabce" and output.finish_reason == "stop"
    stats = engine.stats()
    assert engine.runner.steps < 15 and stats.generated_tokens == 25
    assert engine.runner.steps + sum(stats.right_guesses) == 25  # each step gave its own token, and those guessed right
    assert sum(stats.right_guesses) <= stats.guessed_tokens <= 4 * stats.guesses < 4 * stats.steps
    assert stats.guesses >= stats.right_guesses[0] >= stats.right_guesses[3] > 0
    assert stats.step_tokens.total == 3 + (stats.steps - 1) + stats.guessed_tokens  # the prompt, then known and guessed


def test_a_runner_that_verifies_no_guesses_is_said_to(caplog):
    runner = Scripted("abab", 3)
    runner.max_drafts = 0
    engine = Engine(runner, ByteTokenizer(), EngineOptions(speculative_tokens=4))
    assert "speculative_tokens is 4, but this runner verifies at most 0 guesses" in caplog.text
    drain(engine, [Request("r", [1, 2, 3], SamplingParams(max_tokens=9))])
    assert engine.stats().guesses == 0


def test_a_stop_string_among_right_guesses_ends_the_answer_there():
    engine = Engine(Guessed("ab ab ab ab. no more", 3), ByteTokenizer(), EngineOptions(speculative_tokens=4))
    (output,) = drain(engine, [Request("r", [1, 2, 3], SamplingParams(stop=["b. "], max_tokens=50))])
    assert output.text == "ab ab ab a" and bytes(output.token_ids) == b"ab ab ab ab. "
    assert output.stop_reason == "b. "


def test_steps_have_as_many_tokens_as_the_runner_allows_now():
    """A runner may learn what its machine can do; a limit that the user set stands."""
    for limit in (None, 8):
        engine = make(max_num_batched_tokens=limit)
        engine.add(ask("stream", max_tokens=20))
        engine.step()
        engine.add(ask("long", prompt=range(1, 50), max_tokens=2))
        counts = []
        for allowed in (5, 11, 3):
            engine.runner.max_step_tokens = allowed
            before = engine.runner.tokens_computed
            engine.step()
            counts.append(engine.runner.tokens_computed - before)
        assert counts == ([8, 8, 8] if limit else [5, 11, 3])


def test_on_this_thread_a_row_with_a_grammar_holds_its_step_for_nobody_and_misses_none():
    """Beside rows that run a step ahead it would be in every other step only."""
    engine = Engine(LateRunner(MEMORY), options=EngineOptions(seed=1), constraints=constraints(None, MEMORY.max_rows))
    engine.add(ask("plain", max_tokens=12))
    engine.add(ask("strict", max_tokens=12, grammar=Grammar("regex", "fine:20"), stop_token_ids=[END]))
    outputs = drain(engine, [])
    assert engine.stats().steps == 12
    assert next(o for o in outputs if o.request_id == "plain").token_ids == expected_tokens([1, 2, 3], 7, 12)


def test_a_step_under_way_is_finished_when_nothing_follows():
    runner = LateRunner(MEMORY)
    engine = Engine(runner)
    (output,) = drain(engine, [ask(max_tokens=1)])
    assert output.token_ids == expected_tokens([1, 2, 3], 7, 1) and runner.current is None and not engine.has_work


def test_close_finishes_what_is_under_way():
    runner = LateRunner(MEMORY)
    engine = Engine(runner)
    engine.add(ask(max_tokens=9))
    for _ in range(3):
        engine.step()
    assert runner.current is not None
    engine.close()
    assert runner.current is None and engine.stats().kv_blocks_used == 0


def test_behind_an_answer_a_step_is_computed_to_its_end_before_the_next_is_planned():
    """Whoever had the answer may ask again at once, and would wait for a step more."""
    asked = []

    class Telling(LateRunner):
        def help(self, to_the_end):
            asked.append(to_the_end)
            super().help(to_the_end)

    engine = Engine(Telling(MEMORY))
    drain(engine, [ask("a", max_tokens=12), ask("b", max_tokens=4)])
    assert asked[:2] == [False] * 2 and asked[-6:] == [True] * 6
