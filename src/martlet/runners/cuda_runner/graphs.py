"""Steps as CUDA graphs: decoding at a ladder of batch sizes for each kind of sampling, and steps with prompts.

A graph reads its step from a fixed buffer, `inbox`; rows past the batch's end are -1 and do nothing. A few sizes are
captured at the start, the others while nobody asks for anything (`capture_next`), or else when first needed, in between
steps. All share one memory pool, since they never run at once.

A step with prompts launches some ten kernels a layer, 15 ms of Python however short the prompts are, and several times
that while other threads of a server want Python too. So such a step is a graph as well where that costs little padding
(`Mixed`). It ends at the logits; sampling follows outside.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from martlet.kernels.cuda import decode_hopper, few_rows, launch, layers, sampling
from martlet.model.spec import DecoderSpec
from martlet.runners.cuda_runner import sampler
from martlet.runners.cuda_runner.decoder import Decoder, State, StepTensors
from martlet.runners.cuda_runner.mailbox import Mailbox
from martlet.runners.cuda_runner.mixed import MIXED_SEQUENCES, Mixed

log = logging.getLogger("martlet")

EAGER_SIZES = (8, 1)  # captured at the start
MOST_MIXED = 2048  # tokens of a step with prompts that may be a graph
MIXED_DECODES = (0, 16, 64, 256)
MOST_AHEAD = 64  # decodes of mixed graphs that nobody needed yet; each keeps logits for as many and more
LAUNCHES_MS = 15.0  # of a step outside a graph
CAPTURE_MS = 30.0  # of a graph of such a step
PADDING_MS = 6.0  # that such a step may compute for nothing
MIXED_MS = 50.0  # how long a step may keep those waiting who decode
FLOPS = 6e14  # a GPU's rate for products of this size


def ladder(most: int) -> list[int]:
    """Batch sizes that have a graph: steps stay within an eighth or so of the size, and `most` is the last.

    None between 1 and 8: cuBLAS is no faster there (on an H200 slower, for some shapes twice).
    """
    sizes = [1, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


def rungs(ms_a_token: float) -> list[int]:
    """Tokens of steps with prompts that have a graph: powers of two, and more where half of a step costs too much."""
    fine = ms_a_token * MOST_MIXED / 2 > PADDING_MS
    return [64, 128, 256, *(range(512, MOST_MIXED + 1, 256) if fine else (512, 1024, MOST_MIXED))]


class Graphs:
    """captured: what a graph is for -> the graph and the logits it leaves (kept for SPECIAL and mixed steps alone)."""

    def __init__(self, decoder: Decoder, state: State, max_rows: int):
        self.decoder, self.state = decoder, state
        self.sizes = ladder(max_rows)
        self.decodes = [size for size in MIXED_DECODES if size < max_rows] + [max_rows]
        self.ms_a_token = ms_a_token(decoder.spec)
        self.rungs = rungs(self.ms_a_token)
        words = max(4 * _room(max_rows), Mixed(max_rows, MOST_MIXED, decoder.queries).words)
        self.inbox = torch.full((words,), -1, dtype=torch.int32, device=decoder.device)
        self.out = torch.empty(max_rows, dtype=torch.int32, device=decoder.device)
        self.captured: dict[tuple[int, str, bool] | Mixed, tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        self.missed: dict[Mixed, float] = {}  # ms that launches took which a graph would have saved
        self._compiler: launch.CompiledBehind | None = None
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(decoder.device)

    @contextmanager
    def compiled(self, *, whole: bool) -> Iterator[None]:
        """Compile kernels on other threads while what stands inside runs: those of the first steps or, if `whole`, all
        that steps are likely to need. `compile_others` sees to the rest.

        It may launch no kernel of ours, nor need weights be there yet.
        """
        with launch.compiled_together():
            for size in EAGER_SIZES:
                if size <= self.sizes[-1]:
                    self._blank((size, sampler.GREEDY, False))
            self._blank(Mixed(0, 1024, self.decoder.queries))
            layers.scatter(self.state.flat, self.inbox[:2].view(2, 1))
            if whole:
                self._blank_others()
            yield

    def compile_others(self) -> None:
        """Begin to compile what else steps are likely to need. `is_compiling` until it is there."""
        self._compiler = launch.CompiledBehind(self._blank_others)

    def is_compiling(self, patience: float) -> bool:
        """Wait up to `patience` seconds for the kernels of `compile_others`; whether they are still being compiled."""
        if self._compiler is not None:
            self._compiler.join(patience)
        return self._compiler is not None and self._compiler.is_alive()

    def close(self) -> None:
        if self._compiler is not None:
            self._compiler.cancel()

    def _blank_others(self) -> None:
        most = self.sizes[-1]
        sizes = {most, *(size for size in few_rows.sizes() if size <= most)}
        for spec in {layer.mixer for layer in self.decoder.spec.layers}:
            sizes.update(decode_hopper.sizes(self.sizes, spec, fp8=self.state.scales[0] is not None))
        for kind in (sampler.DRAW, sampler.CUT):
            self._blank((min(8, most), kind, False))
        for adapted in (False, True) if self.decoder.slots is not None else (False,):
            for size in sizes | {min(size, most) for size in EAGER_SIZES} if adapted else sizes:
                self._blank((size, sampler.GREEDY, adapted))
            for decodes in {*self.decodes, *sizes}:
                if 0 < decodes <= 256:  # more take the same kernels
                    self._blank(Mixed(decodes, 512, self.decoder.queries, adapted))

    def prepare(self) -> None:
        """Capture the smallest sizes."""
        for size in EAGER_SIZES:
            if size <= self.sizes[-1]:
                self._graph((size, sampler.GREEDY, False))
                if self.decoder.slots is not None:
                    self._graph((size, sampler.GREEDY, True))

    def capture_next(self) -> bool:
        """Capture a graph that is likely to be wanted. Returns whether there are more.

        What had to do without its graph comes first, then those for few rows.
        These are all sizes of every kind of decoding that there was, and all steps with prompts and few who decode: the
        first one of a length that is no graph took 67 to 83 ms of launches in a server of 8B.
        A step that has to wait for its graph takes five to fifteen times as long.
        """
        kinds = dict.fromkeys(key[1:] for key in self.captured if not isinstance(key, Mixed))
        wanted: list[tuple[int, str, bool] | Mixed] = [(size, *kind) for kind in kinds for size in self.sizes]
        for adapted in dict.fromkeys(adapted for _, adapted in kinds):
            for decodes in (decodes for decodes in self.decodes if decodes <= MOST_AHEAD):
                wanted += (Mixed(decodes, tokens, self.decoder.queries, adapted) for tokens in self.rungs)
        missing = [key for key in dict.fromkeys([*wanted, *self.missed]) if key not in self.captured]
        if missing:
            self._graph(min(missing, key=self._turn))
        return len(missing) > 1

    def _turn(self, key: tuple[int, str, bool] | Mixed) -> tuple[bool, int]:
        return key not in self.missed, key.decodes if isinstance(key, Mixed) else key[0]

    def _saves(self, mixed: Mixed) -> float:
        """ms by which launches outside a graph take longer than the GPU does, where nothing else wants Python."""
        return max(0.0, LAUNCHES_MS - self.ms_a_token * mixed.tokens)

    def run(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        changes: np.ndarray,
        kind: str,
        mailbox: Mailbox,
        *,
        adapted: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay a step of rows [B] at positions [B], changes int32 [2, n <= B] -> (tokens [>= B], logits [B, V]).

        Tokens are the next step's after it is launched, so the caller copies them; logits only for SPECIAL.
        adapted: rows have adapters; steps without run the graph that knows none.
        """
        count = len(rows)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        graph, logits = self._graph((size, kind, adapted))
        words = np.full((4, _room(size)), -1, np.int32)
        words[0, :count] = rows
        words[1] = 0
        words[1, :count] = positions
        words[2:, : changes.shape[1]] = changes
        mailbox.send(words.reshape(-1), self.inbox[: words.size])
        graph.replay()
        return self.out[:count], self.out if logits is None else logits[:count]

    def mixed_for(self, decoding: int, tokens: int, sequences: int, *, adapted: bool = False) -> Mixed | None:
        """The graph for a step of `tokens`: `decoding` sequences of one, and `sequences` others; None if none pays.

        It is captured in quiet time or, where there is none, when as much has been lost without it as capturing takes.
        """
        if not sequences or tokens > MOST_MIXED or sequences > MIXED_SEQUENCES:
            return None
        mixed = Mixed(
            self.decodes[bisect.bisect_left(self.decodes, decoding)],
            self.rungs[bisect.bisect_left(self.rungs, tokens)],
            self.decoder.queries,
            adapted,
        )
        if self.ms_a_token * (mixed.tokens - tokens) > PADDING_MS:
            return None
        if mixed not in self.captured:
            lost = self.missed[mixed] = self.missed.get(mixed, 0.0) + self._saves(mixed)
            return mixed if lost > CAPTURE_MS else None
        return mixed

    def run_mixed(self, mixed: Mixed, words: np.ndarray, mailbox: Mailbox) -> torch.Tensor:
        """Replay `mixed` on what `Mixed.words_of` made -> logits [S, V], good until the next step is launched."""
        graph, logits = self._graph(mixed)
        assert logits is not None
        mailbox.send(words, self.inbox[: words.size])
        graph.replay()
        return logits

    def _graph(self, key: tuple[int, str, bool] | Mixed) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
        found = self.captured.get(key)
        if found is None:
            began = time.perf_counter()
            self._blank(key)  # compiles what is not compiled
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # Not by torch.cuda.graph, which empties the allocator's cache: steps outside graphs would fill it anew.
            with torch.cuda.stream(self.stream):
                # "thread_local": NCCL's own thread may ask after its events meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    logits = self._step(key)
                finally:
                    graph.capture_end()
            found = self.captured[key] = graph, logits
            log.debug("captured a step, %s, in %.3f s", key, time.perf_counter() - began)
        return found

    def _blank(self, key: tuple[int, str, bool] | Mixed) -> None:
        """Run a step of padding alone, which changes nothing."""
        self.inbox.copy_(self._nothing(key))
        self._step(key)

    def _step(self, key: tuple[int, str, bool] | Mixed) -> torch.Tensor | None:
        return self._mixed(key) if isinstance(key, Mixed) else self._decode(*key)

    def _nothing(self, key: tuple[int, str, bool] | Mixed) -> torch.Tensor:
        """An inbox of padding."""
        words = np.full(len(self.inbox), -1, np.int32)
        if isinstance(key, Mixed):
            words[: key.words] = key.padding()
        else:
            words[_room(key[0]) : 2 * _room(key[0])] = 0
        return torch.from_numpy(words)

    def _decode(self, size: int, kind: str, adapted: bool = False) -> torch.Tensor | None:
        room = _room(size)
        words = self.inbox[: 4 * room].view(4, room)[:, :size]
        rows, positions = words[0], words[1]
        step = StepTensors(rows, positions, size, changes=words[2:], adapted=adapted)
        logits = self.decoder.logits(self.decoder.forward(step, self.state))
        if kind == sampler.SPECIAL:
            return logits
        sampling.sample(
            logits, rows, positions, self.state.settings, self.state.tokens,
            greedy=kind == sampler.GREEDY, cut=kind == sampler.CUT, out=self.out[:size],
        )  # fmt: skip
        return None

    def _mixed(self, mixed: Mixed) -> torch.Tensor:
        return self.decoder.logits(self.decoder.forward(mixed.tensors(self.inbox), self.state))


def _room(size: int) -> int:
    """Words between the parts of an inbox: whole units of 16 bytes."""
    return -(-size // 4) * 4


def ms_a_token(spec: DecoderSpec) -> float:
    """Of a long step: what the matrices of the layers cost."""
    parameters = sum(
        spec.width
        * (2 * layer.mixer.q_size + 2 * layer.mixer.kv_size + (3 if layer.mlp.gated else 2) * layer.mlp.hidden)
        for layer in spec.layers
    )
    return 2e3 * parameters / FLOPS


def step_limit(spec: DecoderSpec) -> int:
    """Tokens of a step of MIXED_MS, in whole units that products like."""
    return max(1, int(MIXED_MS / ms_a_token(spec)) // 1024) * 1024
