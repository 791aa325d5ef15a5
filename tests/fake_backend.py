"""A backend whose model echoes: the real engine around a runner that repeats what stands in the prompt.

A prompt is read as bytes. What follows the last \\x02 (or the whole prompt), up to \\x03, is repeated token by token,
that is byte by byte, so every character beyond ASCII is cut between tokens; then comes the end token. Sampled requests
start at a place that depends on their seed. Log-probabilities are made up: -0.25 for the token, -1.25, -2.25 ... below.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
from byte_tokenizer import EOS, ByteTokenizer

from martlet import chat
from martlet.backends.native import NativeBackend
from martlet.chat import normalise
from martlet.engine.options import EngineOptions
from martlet.errors import InvalidRequest
from martlet.hub.card import ModelCard
from martlet.runners.base import Batch, Done, MemoryPlan, NewRow, StepResult, TokenLogprobs

START, END = 2, 3


class EchoRunner:
    """delay: seconds a step takes. may_step: steps wait until it is set. fail_on: a step that computes a row whose
    prompt holds these bytes raises."""

    vocab_size = ByteTokenizer.vocab_size
    lag = 0
    max_step_tokens = max_prefill_tokens = 256
    max_drafts = 0
    max_adapters = 0

    def __init__(self, max_model_len: int = 512, max_rows: int = 16, num_blocks: int = 256):
        self.memory = MemoryPlan(16, num_blocks, max_rows, max_model_len, bytes_per_token=4)
        self.rows: dict[int, NewRow] = {}
        self.delay = 0.0
        self.may_step = threading.Event()
        self.may_step.set()
        self.fail_on = b""
        self.closed = False

    def launch(self, batch: Batch) -> Done:
        time.sleep(self.delay)
        assert self.may_step.wait(60), "the test never let the step go on"
        self.rows.update({new.row: new for new in batch.new_rows})
        tokens = np.full(len(batch.rows), -1, np.int32)
        logprobs, prompt_logprobs = {}, {}
        for b, row in enumerate(batch.rows.tolist()):
            new, begin, end = self.rows[row], int(batch.start[b]), int(batch.start[b] + batch.count[b])
            prompt = new.tokens[: new.prompt_len].tolist()
            if self.fail_on and self.fail_on in bytes(token for token in prompt if token < 256):
                raise RuntimeError("injected failure with a secret in it")
            if new.params.prompt_logprobs is not None:
                prompt_logprobs[b] = [
                    _logprobs(prompt[p + 1], new.params.prompt_logprobs)
                    for p in range(begin, end)
                    if p + 1 < new.prompt_len
                ]
            if batch.sample[b]:
                tokens[b] = _answer(prompt, new, end - new.prompt_len)
                if new.params.logprobs is not None:
                    logprobs[b] = _logprobs(int(tokens[b]), new.params.logprobs)
        return Done(StepResult(tokens, logprobs, prompt_logprobs))

    def close(self) -> None:
        self.closed = True


def _answer(prompt: list[int], new: NewRow, at: int) -> int:
    if START in prompt:
        prompt = prompt[len(prompt) - prompt[::-1].index(START) :]
        prompt = prompt[: prompt.index(END)] if END in prompt else prompt
    if not prompt:  # an empty turn: nothing to repeat
        return EOS if not new.params.ignore_eos else ord(" ")
    if not new.params.greedy:
        turn = new.seed % len(prompt)
        prompt = prompt[turn:] + prompt[:turn]
    ends = at >= len(prompt) and not new.params.ignore_eos
    return EOS if ends else prompt[at % len(prompt)]


def _logprobs(token: int, k: int) -> TokenLogprobs:
    top = [(token + i) % 256 if token < 256 else token - i for i in range(k)]
    return TokenLogprobs(token, -0.25, 1, np.array(top, np.int32), -0.25 - np.arange(k, dtype=np.float32))


class FakeTemplate:
    """role \\x02 content \\x03 for each message."""

    name = "fake"
    tool_format = chat.tool_format("hermes")
    reasoning = chat.reasoning_format("think")
    stop_ids = (EOS,)
    stop = ("<end>",)

    def render(
        self, messages, /, *, tools=None, add_generation_prompt=True, continue_final_message=False, **variables
    ) -> list[int]:
        if variables:
            name = next(iter(variables))
            raise InvalidRequest("the fake template reads no variables", param=f"chat_template_kwargs.{name}")
        text = "".join(f"{turn['role']}\x02{turn['content'] or ''}\x03" for turn in normalise(messages))
        return list((text.removesuffix("\x03") if continue_final_message else text).encode())


def fake_card(**changes) -> ModelCard:
    fields = {"name": "echo", "path": Path("echo"), "format": "dummy", "family": "llama"}
    return ModelCard(**{**fields, "capabilities": ("chat", "completion"), **changes})


class FakeBackend(NativeBackend):
    def __init__(self, runner: EchoRunner | None = None, options: EngineOptions | None = None, card=None):
        self.runner = runner or EchoRunner()
        super().__init__(card or fake_card(), ByteTokenizer(), self.runner, options)

    def check_grammar(self, grammar) -> None:
        raise InvalidRequest("an echo follows no grammar", param="grammar")
