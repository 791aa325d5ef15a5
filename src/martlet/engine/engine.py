"""The engine: requests in, outputs out, one step at a time. Synchronous, deterministic; no HTTP and no asyncio."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

from martlet.engine.adapters import AdapterNames, AdapterSlots
from martlet.engine.block_pool import root_digest
from martlet.engine.constraints import PATIENCE, Constraints, constraints_for
from martlet.engine.detokenizer import Detokenizer
from martlet.engine.histogram import Histogram
from martlet.engine.options import EngineOptions
from martlet.engine.request import FinishReason, Output, Request, Stats
from martlet.engine.scheduler import Plan, Scheduler
from martlet.engine.sequence import Sequence
from martlet.errors import InvalidRequest, MartletError, Overloaded
from martlet.grammar import Grammar
from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import Runner, Step, StepResult, TokenLogprobs

log = logging.getLogger("martlet")

ASKS_AGAIN = 0.03  # seconds within which whoever had an answer may send the next request
BROKEN_AFTER = 3  # failed steps in a row after which the engine reports itself broken


class Engine:
    """Runs requests on a runner.

    `step` launches one step and takes in the oldest one under way, so with a runner whose `lag` is 1 the next step is
    computing while Python reads the last one's tokens. What is hidden behind what, where step k + 1 is under way:

    - A device computes alone. Step k + 2 is planned and launched behind it, then step k + 1 is waited for; its outputs
      are taken on when k + 2 has been launched.
    - A CPU computes with this thread, too, while that has nothing else to do (`Runner.help`). So it computes first,
      until only the head of k + 1 is left; then k + 2 is planned, with the requests that have come meanwhile. The
      launch finishes k + 1 and begins k + 2, behind which the tokens of k + 1 are taken in and its outputs go out.
      A request that comes behind that plan waits for a step more. Where one is likely to come, since somebody has just
      had an answer, the thread computes to the end before it plans. Steps with prompts or grammars are read before.

    When a step of several requests raises, each of them does its part again alone, so that only the one that fails by
    itself is failed.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        constraints: Constraints | None = None,
    ):
        """constraints: instead of those that the tokenizer and llguidance give."""
        options = options or EngineOptions()
        memory = runner.memory
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = memory.longest
        self.max_num_queued = options.max_num_queued
        self.adapters = AdapterNames()
        self.scheduler = Scheduler(
            memory,
            options.max_num_batched_tokens or runner.max_step_tokens,
            options.max_num_batched_tokens or runner.max_prefill_tokens,
            prefix_caching=options.enable_prefix_caching,
            speculative_tokens=min(options.speculative_tokens, runner.max_drafts),
            adapters=AdapterSlots(runner.max_adapters, lambda slot, adapter: runner.load_adapter(slot, adapter)),
        )
        if options.speculative_tokens > runner.max_drafts:
            said = "speculative_tokens is %d, but this runner verifies at most %d guesses a step"
            log.warning(said, options.speculative_tokens, runner.max_drafts)
        self._help = getattr(runner, "help", None)
        self._lag = 0 if self.scheduler.speculative_tokens else runner.lag  # guesses need all tokens that there are
        self._follows_runner = options.max_num_batched_tokens is None
        if constraints is None and tokenizer is not None and tokenizer.eos_ids:
            constraints = constraints_for(tokenizer, runner.vocab_size, memory.max_rows)
        self.constraints = constraints
        self._random = random.Random(options.seed)
        self._requests: dict[str, list[Sequence]] = {}  # sequences of each request that have not ended
        self._forks: dict[str, list[Sequence]] = {}  # sequences that wait for their leader to compute the prompt
        self._in_flight: deque[tuple[Plan, Step | BaseException]] = deque()
        self._outbox: list[Output] = []
        self._arrivals = self._failed_in_a_row = 0
        self._step_tokens = Histogram([1, *(2**e for e in range(3, 15))])
        self._prompt_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._error: str | None = None
        self._step_began: float | None = None
        self._launched = False
        self._ended = 0.0  # when a request did last, by time.monotonic()

    # Requests

    def check(self, request: Request) -> None:
        """Raise InvalidRequest when `request` can never run, ModelNotFound when its adapter is not there.

        Changes nothing; any thread may call it.
        """
        length = len(request.prompt_token_ids)
        if length == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        if length >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {length} tokens; this model takes at most {self.max_model_len} for prompt and "
                "output together",
                param="prompt",
            )
        tokens = np.asarray(request.prompt_token_ids)
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= self.runner.vocab_size:
            raise InvalidRequest(f"prompt token ids go from 0 to {self.runner.vocab_size - 1}", param="prompt")
        request.params.check_vocabulary(self.runner.vocab_size)
        if request.params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none", param="stop")
        if request.adapter is not None:
            self.adapters.get(request.adapter)
        if request.id in self._requests:
            raise InvalidRequest(f"a request with id {request.id!r} is running", param="request_id")
        if request.params.grammar is not None:
            self.check_grammar(request.params.grammar)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile `grammar`: takes milliseconds the first time, seconds at most. Any thread may call it.

        Raises InvalidRequest when it cannot be followed.
        """
        if self.constraints is None:
            raise InvalidRequest("a grammar needs a tokenizer with an end token; this model has none", param="grammar")
        self.constraints.check(grammar)

    def check_room(self, count: int) -> None:
        """Raise Overloaded when `count` more requests would make the line longer than its limit allows.

        Those that find a free row with the next step do not wait: a burst at an idle engine is no line.
        """
        limit, waiting = self.max_num_queued, len(self.scheduler.waiting)
        if limit is not None and waiting + count > limit + self.scheduler.table.num_free:
            raise Overloaded(f"at most {limit} requests may wait, and {waiting} do; try again later")

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` and `check_room` raise."""
        self.check(request)
        self.check_room(1)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has passed. Its adapter is the version that is current now."""
        try:
            adapter = None if request.adapter is None else self.adapters.get(request.adapter)
        except MartletError as error:  # removed since the check
            self._outbox.append(Output(request.id, finish_reason="error", error=error, last=True))
            return
        params = request.params
        tokens = np.asarray(request.prompt_token_ids, np.int32)
        room = self.max_model_len - len(tokens)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed % 2**64
        eos = () if params.ignore_eos or self.tokenizer is None else self.tokenizer.eos_ids
        end_ids = tuple(dict.fromkeys([*eos, *params.stop_token_ids]))
        sequences = [
            Sequence(
                request=request,
                index=index,
                order=(request.priority, self._arrivals, index),
                tokens=tokens,
                prompt_len=len(tokens),
                limit=len(tokens) + min(params.max_tokens or room, room),
                seed=(seed + index) % 2**64,
                end_ids=end_ids,
                root=root_digest(adapter and adapter.cache_key, request.cache_salt),
                adapter=adapter,
                detokenizer=Detokenizer(self.tokenizer, params) if self.tokenizer and params.detokenize else None,
            )
            for index in range(params.n)
        ]
        self._arrivals += 1
        self._prompt_tokens += len(tokens)
        leader, *forks = self._requests[request.id] = sequences
        for fork in forks:
            fork.leader = leader
        if params.grammar is not None and self.constraints is not None:
            for seq in sequences:
                seq.constraint = self.constraints.open(params.grammar, seq)
        if forks:
            self._forks[request.id] = forks
        self.scheduler.add([leader])

    def abort(self, request_id: str) -> None:
        """Stop a request and free all it holds now. Its last Output comes with the next step. Unknown ids: nothing."""
        for seq in list(self._requests.get(request_id, ())):
            self._end(seq, "abort")

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._in_flight or self._outbox)

    # Steps

    def step(self) -> list[Output]:
        """Launch the next step, take in the oldest one due, and return what came out."""
        self.help()
        self.launch()
        return self.collect()

    def help(self) -> None:
        """Before a launch: lend the runner this thread until it is time to plan."""
        if self._in_flight and self._help is not None and not self._is_awaited:
            self._step_began = time.monotonic()
            self._help(self._step_began - self._ended < ASKS_AGAIN)

    @property
    def outputs_wait(self) -> bool:
        """Whether outputs are better delivered behind the next launch, since until then nothing computes."""
        return self.runner.lag > 0 and self._help is None and self.has_work

    def launch(self) -> None:
        """The first half of a step: plan the next one and launch it, unless the one under way is to be read first."""
        self._step_began = self._step_began or time.monotonic()
        self._launched = False
        if self._is_awaited:
            return
        if self._follows_runner:
            self.scheduler.max_step_tokens = self.runner.max_step_tokens
        constrained = self.constraints is not None and self.constraints.active
        if constrained:
            self._hear_constraints()
        plan = self.scheduler.plan()
        for seq, error in self.scheduler.refused:
            log.error("adapter %s could not be loaded: %s", seq.adapter and seq.adapter.name, error, exc_info=error)
            for each in list(self._requests.get(seq.request.id, ())):
                self._end(each, "error", error=error)
        self.scheduler.refused.clear()
        if plan is not None:
            self._step_tokens.observe(plan.batch.num_tokens)
            if constrained and (masks := self.constraints.masks_of(plan.batch, self.scheduler.table)) is not None:
                plan = plan._replace(batch=plan.batch._replace(masks=masks))
            self._in_flight.append((plan, self._launch(plan)))
        self._launched = plan is not None

    def collect(self) -> list[Output]:
        """The second half: wait for the oldest step due, take it in, and return what came out."""
        if self._in_flight and (not self._launched or len(self._in_flight) > self._lag):
            self._take_in(*self._in_flight.popleft())
        elif not self._launched and self.constraints is not None and self.constraints.active:
            self._hear_constraints(PATIENCE)  # all that runs waits for masks
        # Nothing is launched behind a launch that failed: the runner has not heard what that one had to say.
        while self._in_flight and isinstance(self._in_flight[-1][1], BaseException):
            self._take_in(*self._in_flight.popleft())
        outputs, self._outbox = self._outbox, []
        self._step_began = None
        return outputs

    @property
    def _is_awaited(self) -> bool:
        """Whether the step under way is read before another is launched. Where this thread computes, too, running ahead
        gives little: less than a first token is worth, or a grammar, whose row would be in every other step only.
        """
        if self._help is None or not self._in_flight:
            return False
        batch = self._in_flight[-1][0].batch
        only_decodes = not batch.new_rows and batch.num_tokens == len(batch.rows)
        return not only_decodes or (self.constraints is not None and self.constraints.active)

    def _launch(self, plan: Plan) -> Step | BaseException:
        try:
            step = self.runner.launch(plan.batch)
            if plan.batch.masks is not None and plan.batch.masks.bits is None:
                raise NotImplementedError("this runner does not apply grammars")
            return step
        except Exception as error:  # told to the requests of this step when it is taken in
            return error

    def _take_in(self, plan: Plan, step: Step | BaseException) -> None:
        try:
            if isinstance(step, BaseException):
                raise step
            result = step.result()
        except Exception as error:
            self._fail(plan, error)
            return
        self._failed_in_a_row, self._error = 0, None
        if self.scheduler.suspects:
            self.scheduler.clear(plan)
        table, batch = self.scheduler.table, plan.batch
        before = table.arrived[batch.rows]
        chosen = result.tokens if batch.masks is None else batch.masks.judged(result.tokens)
        live, ended = self.scheduler.complete(plan, chosen)
        if batch.masks is not None:
            batch.masks.follow(batch.rows, chosen, live & ~ended, table.held)
        sampled = live & batch.sample & (table.arrived[batch.rows] > before)
        arrived = table.arrived[batch.rows]
        self._generated_tokens += int((arrived - before)[sampled].sum())
        if self._forks:
            self._release_forks(plan, live)
        attention = sampled & (ended | table.watched[batch.rows])
        for b in result.prompt_logprobs:
            if live[b]:
                self._keep_prompt_logprobs(table.sequences[batch.rows[b]], result, plan, b)
        which = np.flatnonzero(attention)
        rows, begin, end = batch.rows[which], before[which], arrived[which]
        columns = (which, rows, begin, end, table.tokens[rows, begin], ended[which])
        for b, row, begin_, end_, token, over in zip(*(column.tolist() for column in columns), strict=True):
            tokens = [token] if end_ - begin_ == 1 else table.tokens[row, begin_:end_].tolist()
            self._advance(table.sequences[row], tokens, over, result.logprobs.get(b))

    def _advance(self, seq: Sequence, tokens: list[int], ended: bool, logprobs: TokenLogprobs | None) -> None:
        """Tokens came for a sequence that somebody watches, or that ends with the last of them."""
        if logprobs is not None:
            seq.logprobs.append(logprobs)
        request, detokenizer = seq.request, seq.detokenizer
        by_token = ended and tokens[-1] in seq.end_ids
        taken = None
        if detokenizer is not None and (request.stream or request.params.stop):
            taken = detokenizer.feed(tokens[:-1] if by_token else tokens)  # the end token's text is no text
        if taken is not None:
            self.scheduler.table.arrived[seq.row] -= len(tokens) - taken
            self._end(seq, "stop", detokenizer.stop)
        elif by_token:
            self._end(seq, "stop", tokens[-1] if tokens[-1] in request.params.stop_token_ids else None)
        elif ended:
            self._end(seq, "length")
        elif request.stream and seq.reported:
            self._tell(seq, tokens)
        elif request.stream:
            self._report(seq, tokens=tokens)

    def _tell(self, seq: Sequence, tokens: list[int]) -> None:
        """Report more of a stream: tokens alone, since its first Output told of the prompt."""
        text = "" if seq.detokenizer is None else seq.detokenizer.delta()
        logprobs = None if seq.request.params.logprobs is None else seq.logprobs[seq.reported :]
        self._outbox.append(Output(seq.request.id, seq.index, tokens, text, logprobs))
        seq.reported += len(tokens)

    def _end(self, seq: Sequence, reason: FinishReason, stop: str | int | None = None, error=None) -> None:
        """The sequence is over: report what is left of it and free what it holds."""
        self.scheduler.remove(seq)
        if seq.constraint is not None and self.constraints is not None:
            self.constraints.close(seq.constraint)
        request = seq.request
        open_sequences = self._requests[request.id]
        open_sequences.remove(seq)
        if not open_sequences:
            del self._requests[request.id]
            self._forks.pop(request.id, None)
            self._finished[reason] += 1
            self._ended = time.monotonic()
        self._report(seq, reason, stop, error, last=not open_sequences)

    def _report(
        self,
        seq: Sequence,
        reason: FinishReason | None = None,
        stop: str | int | None = None,
        error: BaseException | None = None,
        last: bool = False,
        tokens: list[int] | None = None,
    ) -> None:
        """tokens: those that were not reported yet, where the caller has them."""
        request, detokenizer = seq.request, seq.detokenizer
        if tokens is None:
            tokens = self.scheduler.table.output(seq, seq.reported)
        text = ""
        if detokenizer is not None:
            if not (request.stream or request.params.stop):  # nobody needed the text before now
                ends = reason == "stop" and tokens and tokens[-1] in seq.end_ids
                detokenizer.feed(tokens[:-1] if ends else tokens)
            if reason is not None:
                detokenizer.finish()
            text = detokenizer.delta(final=reason is not None)
        wants_logprobs = request.params.logprobs is not None
        tells_prompt = request.params.prompt_logprobs is not None and seq.index == 0 and seq.reported == 0
        self._outbox.append(
            Output(
                request_id=request.id,
                index=seq.index,
                token_ids=tokens,
                text=text,
                logprobs=seq.logprobs[seq.reported :] if wants_logprobs else None,
                finish_reason=reason,
                stop_reason=stop,
                prompt_logprobs=[None, *seq.prompt_logprobs] if tells_prompt else None,
                prompt_tokens=seq.prompt_len,
                cached_tokens=max(seq.cached_tokens, 0),
                queued=seq.entered - request.arrival if seq.entered else None,
                error=error,
                last=last,
            )
        )
        seq.reported += len(tokens)

    def _keep_prompt_logprobs(self, seq: Sequence, result: StepResult, plan: Plan, b: int) -> None:
        """Append those of this step; after a preemption positions are computed again, and count once."""
        if seq.index == 0:
            seq.prompt_logprobs += result.prompt_logprobs[b][len(seq.prompt_logprobs) - int(plan.batch.start[b]) :]

    def _release_forks(self, plan: Plan, live: np.ndarray) -> None:
        """Queue the other sequences of requests whose prompt has been computed."""
        table, batch = self.scheduler.table, plan.batch
        for b in np.flatnonzero(live & batch.sample).tolist():
            seq = table.sequences[batch.rows[b]]
            if seq.index == 0:
                self.scheduler.add(self._forks.pop(seq.request.id, ()))

    def _fail(self, plan: Plan, error: Exception) -> None:
        table, batch = self.scheduler.table, plan.batch
        expected = isinstance(error, MartletError)
        log.error("a step of %d sequences failed: %s", len(batch.rows), error, exc_info=None if expected else error)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= BROKEN_AFTER:
            self._error = f"{self._failed_in_a_row} steps in a row failed"
        rows = batch.rows[table.epoch[batch.rows] == plan.epochs].tolist()
        sequences = [seq for row in rows if (seq := table.sequences[row]) is not None]
        requests = {seq.request.id for seq in sequences}
        if len(requests) > 1 or len(sequences) < len(batch.rows):  # any of them, or of those gone by now, may be why
            self.scheduler.suspect(sequences)
            return
        for request_id in requests:
            self._fail_request(request_id, error)

    def _fail_request(self, request_id: str, error: Exception | None) -> None:
        for seq in list(self._requests.get(request_id, ())):
            self._end(seq, "error", error=error)

    # Grammars: rows that have one are planned when their newest token is known, and sample under a mask

    def _hear_constraints(self, timeout: float = 0.0) -> None:
        """Let rows go on whose late masks have come, and end requests whose grammars broke."""
        constraints, table = self.constraints, self.scheduler.table
        assert constraints is not None
        constraints.poll(timeout)
        for row in np.flatnonzero(table.held).tolist():
            seq = table.sequences[row]
            table.held[row] = seq is not None and seq.constraint is not None and not seq.constraint.ready
        while constraints.failed:
            broken = constraints.failed.pop()
            self._fail_request(broken.owner.request.id, broken.error)

    def stats(self) -> Stats:
        """A snapshot; any thread may call it."""
        scheduler, began = self.scheduler, self._step_began
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + sum(map(len, list(self._forks.values()))),
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_blocks - scheduler.pool.num_free,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            steps=sum(self._step_tokens.counts),
            step_tokens=self._step_tokens,
            guesses=scheduler.guesses,
            guessed_tokens=scheduler.guessed_tokens,
            right_guesses=tuple(scheduler.right_guesses.tolist()),
            max_adapters=scheduler.adapters.size,
            running_adapters=_adapter_names(scheduler.running),
            waiting_adapters=_adapter_names(scheduler.waiting),
            finished=dict(self._finished),
            error=self._error,
            busy_seconds=0.0 if began is None else time.monotonic() - began,
        )

    def close(self) -> None:
        """Abort everything and give the runner's memory back."""
        for request_id in list(self._requests):
            self.abort(request_id)
        while self._in_flight:
            self._take_in(*self._in_flight.popleft())
        if self.constraints is not None:
            self.constraints.shutdown()
        self.runner.close()


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({seq.adapter.name for seq in list(sequences) if seq.adapter is not None}))


def drain(engine: Engine, requests: Iterable[Request]) -> list[Output]:
    """Run requests to their end on this thread and return all outputs, in the order they came."""
    for request in requests:
        engine.add(request)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs
