"""The engine on the CUDA runner gives what the engine on the reference gives, in float32, token for token.

Where there is no GPU one small case runs under Triton's interpreter: all of the code but graphs and overlap.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import DEVICE
from engines import CONFIGS, answers, card, check, options, requests
from toy_grammar import END, allowed, constraints

from martlet.engine.engine import Engine, drain
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import BackendUnavailable, OutOfMemory, UsageError
from martlet.grammar import Grammar
from martlet.hub.card import ModelCard
from martlet.kernels.cuda import decode_attention, decode_hopper, prefill_attention, rotary
from martlet.model import families
from martlet.model.weights import read_spec
from martlet.runners.cuda_runner import CudaRunner, decoder, weights
from martlet.runners.cuda_runner.decoder import StepTensors
from martlet.runners.cuda_runner.mixed import MIXED_SEQUENCES, HostStep, Mixed
from martlet.runners.torch_runner import TorchRunner
from martlet.sampling_params import SamplingParams

gpu = pytest.mark.gpu


def test_what_it_cannot_run_it_says():
    mixture = ModelCard("m", Path("-"), "dummy", "mixtral", config=families.example("mixtral"))
    with pytest.raises(BackendUnavailable, match="mixtures of experts"):
        CudaRunner(mixture, options(DEVICE))


def reference(family: str, **settings) -> dict:
    want = answers(TorchRunner(card(family), options("cpu")), **settings)
    assert any(want[key][0] != want["0", 0][0] for key in want)
    return want


@pytest.mark.parametrize(("family", "first"), [("qwen3", None), ("gemma2", 3)])
def test_the_engine_answers_as_on_the_reference(family, first):
    runner = CudaRunner(card(family), options(DEVICE), step_tokens=64)
    check(answers(runner, max_tokens=2, first=first), reference(family, max_tokens=2, first=first))
    runner.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # the second with biases, the third with norms behind
def test_sums_of_a_narrow_model_are_float32(family, monkeypatch):
    def logprobs(runner) -> np.ndarray:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=0, prompt_logprobs=0, ignore_eos=True)
        outputs = drain(Engine(runner), [Request("0", list(range(30, 49)), params)])
        assert not [o.error for o in outputs if o.error]
        found = [e.logprob for o in outputs for e in [*(o.prompt_logprobs or [])[1:], *o.logprobs]]
        assert len(found) == 20
        return np.array(found)

    want = logprobs(TorchRunner(card(family), options("cpu")))
    apart = []
    for narrow in (decoder.NARROW, 0):
        monkeypatch.setattr(decoder, "NARROW", narrow)
        runner = CudaRunner(card(family), replace(options(DEVICE), dtype="float16"), step_tokens=64)
        assert runner.decoder.sums == (torch.float32 if narrow else torch.float16)
        apart.append(np.abs(logprobs(runner) - want).mean())
        runner.close()
    assert 0 < apart[0] < 0.9 * apart[1] < 1e-2


def test_weights_keys_and_values_in_fp8_change_log_probabilities_little():
    plain = TorchRunner(card("llama"), options("cpu"))
    runner = CudaRunner(card("llama"), options(DEVICE, quant="fp8", kv_dtype="fp8"), step_tokens=64)
    assert runner.memory.bytes_per_token == plain.memory.bytes_per_token // 4 + 2 * 2 * 2 * 4  # and the scales
    params = SamplingParams(temperature=0, max_tokens=2, n=2, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    found = []
    for one in (plain, runner):
        outputs = drain(Engine(one), [Request("0", list(range(30, 49)), params)])
        found.append([e.logprob for o in outputs for e in (*(o.prompt_logprobs or [None])[1:], o.logprobs[0])])
    assert len(found[0]) >= 20 and 0 < np.abs(np.subtract(*found)).mean() < 0.02
    runner.close()


def test_a_step_that_does_not_fit_runs_in_pieces_and_those_after_it_are_smaller(monkeypatch):
    prompts = [list(range(30, 30 + n)) for n in (100, 41, 3)]
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    sizes = {"max_model_len": 128, "kv_cache_tokens": 640}
    runner = CudaRunner(card("qwen3"), options(DEVICE, **sizes), step_tokens=256)
    forward, seen = runner.decoder.forward, []

    def narrow(step, state):
        seen.append(len(step.rows))
        if len(step.rows) > 80:
            raise torch.cuda.OutOfMemoryError("pretended")
        return forward(step, state)

    monkeypatch.setattr(runner.decoder, "forward", narrow)
    found = []
    for one in (TorchRunner(card("qwen3"), options("cpu", **sizes)), runner):
        outputs = drain(Engine(one, options=EngineOptions(seed=0)), requests)
        assert not [o.error for o in outputs if o.error]
        found.append({o.request_id: (o.token_ids, [e.logprob for e in o.prompt_logprobs[1:]]) for o in outputs})
    assert seen[:3] == [144, 72, 72] and runner.max_step_tokens == 72
    for i in found[0]:
        assert found[0][i][0] == found[1][i][0] and np.allclose(found[0][i][1], found[1][i][1], atol=1e-4)

    monkeypatch.setattr(runner.decoder, "forward", lambda *_: narrow(HostStep(*[[0] * 99] * 6), None))
    engine = Engine(runner)
    (failed,) = drain(engine, [requests[0]])
    assert isinstance(failed.error, OutOfMemory)
    monkeypatch.setattr(runner.decoder, "forward", forward)
    assert drain(engine, [requests[2]])[-1].token_ids == found[0]["2"][0]
    runner.close()


def test_fp8_weights_are_those_of_the_checkpoint_with_a_scale_a_row():
    spec = read_spec(card("qwen2"))
    plain, small = (
        weights.load(card("qwen2"), spec, torch.device("cpu"), torch.float32, fp8=fp8) for fp8 in (False, True)
    )
    for one, other in zip(plain.blocks, small.blocks, strict=True):
        for name in ("qkv", "o", "up", "down"):
            want, got = getattr(one, name), getattr(other, name)
            assert got.matrix.dtype == torch.float8_e4m3fn and not want.fp8
            error = (got.matrix.float() * got.scales[:, None] - want.matrix).abs()
            assert (error <= want.matrix.abs() / 16 + got.scales[:, None] / 512).all()
    assert torch.equal(plain.head.matrix, small.head.matrix) and small.nbytes < plain.nbytes


def test_a_kind_of_kv_memory_that_a_runner_lacks_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'int8'.* auto or fp8"):
        CudaRunner(card("qwen3"), options(DEVICE, kv_dtype="int8"))
    with pytest.raises(UsageError, match=r"'fp8'.* auto"):
        TorchRunner(card("qwen3"), options("cpu", kv_dtype="fp8"))


def test_tokens_of_new_rows_are_there_before_a_graph_reads_them():
    """Within a graph's first kernel one program would write a token while another reads it."""
    runner, late = CudaRunner(card("qwen3"), options(DEVICE, max_num_seqs=16), graphs=False), []

    def run(rows, positions, changes, *_, adapted):
        fresh = rows[positions == 0]
        assert (runner.state.tokens[fresh.astype(np.int64), 0] == 5).all()
        late.append((len(fresh), changes.shape[1]))
        return torch.zeros(len(rows), dtype=torch.int32), None

    runner.graphs = SimpleNamespace(run=run, mixed_for=lambda *_, **__: None, close=lambda: None)
    engine = Engine(runner)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for number in range(13):
        engine.add(Request(str(number), [5], params))
        if number >= 11:
            engine.step()
    outputs = drain(engine, [])
    assert len(outputs) == 13 and late[:2] == [(12, 0), (1, 0)] and any(changes for _, changes in late)
    runner.close()


def test_masks_hold_beside_rows_without():
    def constrained(runner):
        wants = [
            {"temperature": 0, "grammar": Grammar("regex", "fine:2"), "logit_bias": {7: 3.0}},
            {"temperature": 0},
            {"temperature": 1, "seed": 3, "grammar": Grammar("regex", "fine:1"), "top_k": 3, "logprobs": 1},
        ]
        asked = [
            Request(str(i), [5, 9, 2 + i], SamplingParams(max_tokens=3, stop_token_ids=[END], **want))
            for i, want in enumerate(wants)
        ]
        engine = Engine(runner, options=EngineOptions(seed=0), constraints=constraints(None, 6, words=10))
        outputs = sorted(drain(engine, asked), key=lambda output: output.request_id)
        engine.close()
        return [(output.token_ids, output.finish_reason) for output in outputs]

    got = constrained(CudaRunner(card("qwen3"), options(DEVICE), step_tokens=64))
    assert got == constrained(TorchRunner(card("qwen3"), options("cpu")))
    assert [got[0][0][2:], got[2][0][1:]] == [[END], [END]] and [got[0][1], got[2][1]] == ["stop", "stop"]
    for text, tokens in (("fine:2", got[0][0]), ("fine:1", got[2][0])):
        for at, token in enumerate(tokens):
            assert allowed(text, tokens[:at])[token // 32] >> np.uint32(token % 32) & 1


def rotate_and_attend(qkv, norms, eps, table, rows, positions, blocks, cache, spec, scales=None, slots=None, out=None):
    """`decode_hopper.attend` by kernels that run anywhere, and nothing for tokens whose row has others here."""
    q = rotary.rotate_and_write(qkv.clone(), norms, eps, table, rows, positions, blocks, cache, spec, scales)
    _, which, counts = rows.unique(return_inverse=True, return_counts=True)
    alone, room = (rows >= 0) & (counts[which] == 1), decode_attention.scratch([spec], rows.device)
    out[~alone] = torch.nan
    if alone.any():
        out[alone] = decode_attention.decode_attention(
            q[alone], cache, blocks, rows[alone], positions[alone], spec, room, scales=scales
        )
    return out


@torch.inference_mode()
def test_a_step_spread_over_the_places_of_a_graph_is_the_same_step(monkeypatch):
    runner = CudaRunner(card("qwen3"), options(DEVICE), step_tokens=64, graphs=False)
    random = np.random.default_rng(0)
    state, queries = runner.state, runner.decoder.queries
    state.tokens.copy_(torch.from_numpy(random.integers(0, 300, state.tokens.shape)))
    state.blocks.copy_(torch.from_numpy(random.permutation(80)[: 6 * 13].reshape(6, 13)).repeat(1, 2)[:, :16])
    start, count, rows = np.array([6, 0, 3, 0]), np.array([1, 1, 5, 33]), np.array([4, 0, 5, 2])
    offset = np.cumsum(count) - count
    step = HostStep(
        rows=np.repeat(rows, count),
        positions=np.concatenate([np.arange(s, s + c) for s, c in zip(start, count, strict=True)]),
        decoding=2,
        tiles=prefill_attention.tiles(start[2:], count[2:], queries),
        sequences=np.stack([rows, start, count, offset])[:, 2:],
        picks=np.array([0, 39, 6]),
    )

    def there(array):
        return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(runner.device)

    packed = StepTensors(
        there(step.rows), there(step.positions), 2, tiles=there(step.tiles), sequences=there(step.sequences),
        picks=there(step.picks),
    )  # fmt: skip
    want = runner.decoder.forward(packed, state)
    whole = runner.decoder.forward(replace(packed, picks=None), state)
    none = runner.decoder.forward(replace(packed, picks=there(np.empty(0))), state)
    assert torch.allclose(want, whole[[0, 39, 6]], atol=1e-5) and len(none) == 0
    for mixed, able in ((Mixed(4, 48, queries), False), (Mixed(48, 48, queries), True)):
        monkeypatch.setattr(decode_hopper, "able", lambda *_, able=able: able)
        monkeypatch.setattr(decode_hopper, "attend", rotate_and_attend)
        for cache in state.caches:
            cache.zero_()
        got = runner.decoder.forward(mixed.tensors(there(mixed.words_of(step))), state)
        assert len(got) == mixed.decodes + MIXED_SEQUENCES
        assert torch.allclose(got[:3], want, atol=1e-5) and want.abs().max() > 0.1
    padding = runner.decoder.forward(mixed.tensors(there(mixed.padding())), state)
    assert len(padding) == len(got)
    runner.close()


@gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_whole_in_chunks_and_again(family, graphs):
    want, runner = reference(family), CudaRunner(card(family), options("cuda"), graphs=graphs, step_tokens=64)
    check(answers(runner), want)
    check(answers(runner), want)
    check(answers(runner, max_num_batched_tokens=7, enable_prefix_caching=False), want)
    runner.close()


@gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_preempted(family):
    engine = Engine(CudaRunner(card(family), options("cuda", kv_cache_tokens=84)), options=EngineOptions(seed=0))
    tokens: dict = {}
    for output in drain(engine, requests()):
        tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert engine.stats().preemptions > 0
    assert tokens == {key: entry[0] for key, entry in reference(family).items()}
    engine.close()
