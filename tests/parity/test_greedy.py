"""Greedy answers of the real default model equal transformers' on the same weights in float32, however they are run.

The reference reads our answer in one teacher-forced pass: by induction, each of our tokens being its best next token
means that its own greedy answer is the same. A token may differ only where the reference's two best logits lie within
NEAR of each other; then it is printed.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from martlet import hub
from martlet.chat import template_for
from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.runners.base import LoadOptions
from martlet.runners.cpu_runner import CpuRunner
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

NEAR = 1e-3
NEW_TOKENS = 64
FEWER_TOKENS = 24  # where an answer is only compared with that one

CHATS = [
    "What is the capital of France?",
    "Write a haiku about a swift that never lands.",
    "Explain recursion to a ten year old.",
    "你好！请用中文介绍一下杭州。",
    "日本の首都はどこですか？",
    "서울에서 무엇을 먹을까요?",
    "Translate 'good morning' into French, German and Spanish.",
    "List three uses of a paper clip. 📎🙂🎉",
    "Write a Python function that reverses a linked list.",
    "If a train leaves at 3 pm and travels 120 km at 80 km/h, when does it arrive?",
]
RAW = [
    "The",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders\nWHERE",
    "浙江 -> 杭州\n安徽 -> 合肥\n四川 ->",
    "🙂🙃🙂🙃🙂",
    "1, 1, 2, 3, 5, 8, 13,",
    '{"name": "martlet", "wings": 2, "feet":',
    " ".join(f"Entry {i}: the lamp in room {i * 7 % 40} was checked at {i % 24} o'clock." for i in range(15)),
    " ".join(f"On day {i} the ship sailed {i * 13 % 90} miles and the log says all is well." for i in range(80)),
]


@pytest.fixture(scope="module")
def card():
    return hub.resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def prompts(card):
    tokenizer = hub.load_tokenizer(card)
    template = template_for(card, tokenizer)
    chats = [template.render([{"role": "user", "content": text}]) for text in CHATS]
    prompts = chats + [tokenizer.encode_prompt(text) for text in RAW]
    assert len(prompts) == 20 and min(map(len, prompts)) == 1 and 1400 <= max(map(len, prompts)) <= 1800
    return prompts


@pytest.fixture(scope="module", params=[CpuRunner, TorchRunner])
def make_runner(request, card):
    return lambda **options: request.param(card, LoadOptions(device="cpu", dtype="float32", **options))


@pytest.fixture(scope="module")
def runner(make_runner):
    runner = make_runner(kv_cache_tokens=8192, max_model_len=2048)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def reference(card):
    folder, file = os.path.split(card.path)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=config, dtype=torch.float32
    )
    assert model.dtype == torch.float32
    return model.eval()


def answer(runner, prompts, *, order=None, new_tokens=NEW_TOKENS, **options) -> list[list[int]]:
    """Greedy answers on a fresh engine, all requests at once."""
    engine = Engine(runner, options=EngineOptions(**options))
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    order = order or range(len(prompts))
    outputs = drain(engine, [Request(str(i), prompts[i], params) for i in order])
    found = {int(o.request_id): o.token_ids for o in outputs}
    return [found[i] for i in sorted(order)]


@pytest.fixture(scope="module")
def answers(runner, prompts):
    return answer(runner, prompts)


@pytest.fixture(scope="module")
def read_by_reference():
    """Readings of the reference, kept: both runners give the same answers."""
    return {}


@pytest.fixture(scope="module")
def gaps(reference, prompts, answers, read_by_reference):
    """For each answer: how far each token lies below the best logit of the reference, and the gap of its two best."""
    for prompt, tokens in zip(prompts, answers, strict=True):
        key = tuple(prompt), tuple(tokens)
        if key in read_by_reference:
            continue
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens]), logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
        best = logits.topk(2).values
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        read_by_reference[key] = np.asarray(best[:, 0] - chosen), np.asarray(best[:, 0] - best[:, 1])
    return [read_by_reference[tuple(prompt), tuple(tokens)] for prompt, tokens in zip(prompts, answers, strict=True)]


def test_answers_are_those_of_transformers(prompts, answers, gaps):
    for number, (loss, _) in enumerate(gaps):
        assert len(answers[number]) == NEW_TOKENS
        for at in np.flatnonzero(loss > 0):
            print(f"prompt {number}: token {at} lies {loss[at]:.2e} below the reference's best")
        assert loss.max() <= NEAR, f"prompt {number} leaves the reference at token {int(loss.argmax())}"


def assert_same(got, answers, gaps, chosen):
    """The answer's beginning, or different from a token on where the reference itself is undecided."""
    for number, tokens in zip(chosen, got, strict=True):
        assert len(tokens) >= FEWER_TOKENS
        different = [at for at, pair in enumerate(zip(tokens, answers[number], strict=False)) if pair[0] != pair[1]]
        if different:
            gap = gaps[number][1][different[0]]
            print(f"prompt {number}: differs from token {different[0]} on, where the two best lie {gap:.2e} apart")
            assert gap <= NEAR, f"prompt {number} differs at token {different[0]}, gap {gap:.2e}"


SHORT = [4, 7, 10, 11, 12, 14, 15, 16, 17]
CHUNKS = {1: SHORT, 7: [0, *SHORT], 64: [3, *SHORT, 18, 19]}  # small chunks make many steps: they get less to do


@pytest.mark.parametrize(("chunk", "chosen"), CHUNKS.items())
def test_any_chunk_size_gives_the_same(runner, prompts, answers, gaps, chunk, chosen):
    got = answer(runner, prompts, order=chosen, new_tokens=FEWER_TOKENS, max_num_batched_tokens=chunk)
    assert_same(got, answers, gaps, chosen)


def test_a_prefix_hit_gives_the_same(runner, prompts, answers, gaps):
    engine = Engine(runner)
    params = SamplingParams(temperature=0, max_tokens=FEWER_TOKENS, ignore_eos=True)
    chosen = [0, 8, 18]
    for round_ in range(2):
        requests = [Request(f"{round_}-{i}", prompts[i], params) for i in chosen]
        outputs = {int(o.request_id[2:]): o for o in drain(engine, requests)}
        if round_:
            assert all(outputs[i].cached_tokens >= len(prompts[i]) // 16 * 16 - 16 for i in chosen)
        assert_same([outputs[i].token_ids for i in chosen], answers, gaps, chosen)


def test_preemption_gives_the_same(make_runner, prompts, answers, gaps):
    small = make_runner(kv_cache_tokens=512, max_model_len=512)
    chosen = [i for i in range(20) if len(prompts[i]) < 200]
    engine = Engine(small, options=EngineOptions(enable_prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = {int(o.request_id): o for o in drain(engine, [Request(str(i), prompts[i], params) for i in chosen])}
    assert engine.stats().preemptions > 0
    assert_same([outputs[i].token_ids for i in chosen], answers, gaps, chosen)
    small.close()


def test_alone_gives_the_same(runner, prompts, answers, gaps):
    for number in (2, 3, 12, 15):
        got = answer(runner, prompts, order=[number], new_tokens=FEWER_TOKENS)
        assert_same(got, answers, gaps, [number])


def test_any_batch_order_gives_the_same(runner, prompts, answers, gaps):
    order = np.random.default_rng(5).permutation(19).tolist()
    assert_same(answer(runner, prompts, order=order, new_tokens=FEWER_TOKENS), answers, gaps, range(19))


@pytest.mark.parametrize(("quant", "near"), [(None, 0.25), ("bf16", 0.25)], ids=["gguf", "bf16"])
def test_rounded_precisions_leave_the_reference_only_where_it_is_undecided(card, prompts, reference, quant, near):
    """With blocks as they are in the file, or bfloat16, a token may differ where the best logits lie within `near`."""
    runner = CpuRunner(card, LoadOptions(quant=quant, kv_cache_tokens=8192, max_model_len=2048))
    chosen = [i for i in range(20) if len(prompts[i]) < 400]
    same = total = 0
    for number, tokens in zip(chosen, answer(runner, prompts, order=chosen), strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompts[number] + tokens])
            logits = reference(ids, logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
        loss = np.asarray(logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0])
        assert loss.max() <= near, f"prompt {number} leaves the reference at token {loss.argmax()}: {loss.max():.3f}"
        same, total = same + int((loss == 0).sum()), total + len(loss)
    print(f"{quant or 'gguf'}: {same} of {total} tokens are the reference's best")
    assert same > 0.97 * total
    runner.close()
