"""What we ask of vLLM and how we read its answers, on a stand-in that records the calls."""

from __future__ import annotations

import json
import queue
from pathlib import Path

import fake_vllm
import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer
from safetensors.numpy import save_file

from fake_backend import fake_card
from martlet.engine.options import EngineOptions
from martlet.engine.request import Request
from martlet.errors import BackendUnavailable, InvalidRequest, MartletError, Overloaded, UsageError
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams


@pytest.fixture
def load(monkeypatch):
    fake_vllm.install(monkeypatch)
    from martlet.backends.vllm_backend import load_vllm

    loaded = []

    def load(path="model", options=None, engine=None, **card):
        card = fake_card(path=Path(path), **{"format": "safetensors", **card})
        loaded.append(load_vllm(card, ByteTokenizer(), options or LoadOptions(), engine or EngineOptions()))
        return loaded[-1]

    yield load
    for backend in loaded:
        backend.close()
        backend.close()
        assert backend._engine.stopped and not backend._thread.is_alive()


def ask(name="a", prompt=(104, 105), *, stream=True, **params):
    return Request(name, list(prompt), SamplingParams(**{"max_tokens": 5, **params}), stream=stream)


def test_deltas_make_the_answer(load):
    backend = load()
    outputs = list(backend.generate([ask(n=2)]))
    for index in range(2):
        mine = [o for o in outputs if o.index == index]
        assert "".join(o.text for o in mine) == "hihih"
        assert [t for o in mine for t in o.token_ids] == [104, 105, 104, 105, 104]
        assert [o.finish_reason for o in mine] == [None] * 4 + ["length"]
    assert [o.last for o in outputs] == [False] * 9 + [True]
    stats = backend.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.cached_tokens, stats.finished) == (
        2,
        10,
        4,
        {"length": 1},
    )
    assert backend.max_model_len == 64 and backend.vocab_size == 258


def test_a_request_that_does_not_stream_gets_one_output_a_sequence(load):
    outputs = list(load().generate([ask(stream=False, n=2)]))
    assert [(o.index, o.text, o.last) for o in outputs] == [(0, "hihih", False), (1, "hihih", True)]


def test_every_sampling_parameter_is_passed_on(load):
    backend = load()
    params = SamplingParams(
        n=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1.0, frequency_penalty=0.5,
        repetition_penalty=1.2, seed=3, stop=["x"], stop_token_ids=[5], include_stop_str_in_output=True,
        ignore_eos=True, max_tokens=4, min_tokens=1, logprobs=1, prompt_logprobs=1, logit_bias={4: 2.0},
        allowed_token_ids=[1, 2], skip_special_tokens=False,
    )  # fmt: skip
    list(backend.generate([Request("r", [1, 2, 3], params, priority=3, cache_salt="s")]))
    prompt, sent, name, priority = backend._engine.calls[0]
    assert (prompt, name, priority) == ({"prompt_token_ids": [1, 2, 3], "cache_salt": "s"}, "r", 3)
    assert sent.output_kind.name == "FINAL_ONLY"
    for field in fake_vllm.SamplingParams.FIELDS:
        if field != "output_kind":
            value = getattr(params, field)
            assert getattr(sent, field) == (list(value) if isinstance(value, tuple) else value), field


def test_logprobs_are_translated(load):
    outputs = list(load().generate([ask(max_tokens=2, logprobs=2, prompt_logprobs=1)]))
    entry = outputs[0].logprobs[0]
    assert (entry.token, entry.logprob, entry.rank) == (104, -0.5, 1)
    assert entry.top_ids.tolist() == [104, 9] and entry.top_logprobs.tolist() == [-0.5, -3.0]
    assert outputs[1].prompt_logprobs is None
    first, second = outputs[0].prompt_logprobs
    assert first is None
    assert (second.token, second.rank, second.top_ids.tolist()) == (105, 2, [7])


def test_options_become_engine_arguments(load):
    options = LoadOptions(
        dtype="bfloat16", max_model_len=99, max_num_seqs=3, kv_cache_tokens=100, memory_utilization=0.5
    )
    engine = EngineOptions(max_num_batched_tokens=512, enable_prefix_caching=False, seed=4)
    args = vars(load("some/folder", options, engine)._engine.args)
    assert args == {
        "model": "some/folder", "dtype": "bfloat16", "load_format": "auto", "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False, "max_logprobs": 20, "scheduling_policy": "priority",
        "trust_remote_code": False, "max_model_len": 99, "max_num_seqs": 3, "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 7, "block_size": 16, "seed": 4,
    }  # fmt: skip
    assert vars(load(format="dummy")._engine.args)["load_format"] == "dummy"
    with pytest.raises(UsageError, match="--device cpu"):
        load(options=LoadOptions(device="cpu"))


def test_a_model_that_vllm_cannot_load(load):
    with pytest.raises(BackendUnavailable, match="vLLM cannot load echo: no such checkpoint"):
        load("broken")


def test_failures_stay_with_their_request(load):
    backend = load()
    bad, refused, good = list(backend.generate([ask("bad", [13], stream=False)])), [], []
    assert bad[0].finish_reason == "error" and "CUDA error" in str(bad[0].error) and bad[0].last
    refused = list(backend.generate([ask("refused", [14])]))
    assert isinstance(refused[0].error, InvalidRequest)
    good = list(backend.generate([ask("good")]))
    assert good[-1].finish_reason == "length"
    assert backend.stats().finished == {"error": 2, "length": 1} and backend.stats().error is None
    backend._engine.errored = True
    assert backend.stats().error


def test_abort_cancels_in_vllm_and_tells_the_sink(load):
    backend = load()
    outbox = queue.SimpleQueue()
    backend.submit([ask("long", max_tokens=None), ask("at once", max_tokens=None)], outbox)
    backend.abort(["at once", "unknown"])
    last = []
    while len(last) < 1:
        last += [o for o in outbox.get(timeout=5) if o.last]
    backend.abort(["long"])
    while len(last) < 2:
        last += [o for o in outbox.get(timeout=5) if o.last]
    assert [(o.request_id, o.finish_reason) for o in last] == [("at once", "abort"), ("long", "abort")]
    assert sorted(backend._engine.aborted) == ["at once", "long"]
    assert backend.stats().running == 0


def test_closing_aborts_what_runs(load):
    backend = load()
    outbox = queue.SimpleQueue()
    backend.submit([ask("a", max_tokens=None)], outbox)
    backend.close()
    last = [o for _ in range(outbox.qsize()) for o in outbox.get() if o.last]
    assert [o.finish_reason for o in last] == ["abort"]
    with pytest.raises(MartletError, match="shut down"):
        backend.submit([ask("b")], outbox)


def test_what_cannot_run_is_refused_before_vllm_sees_it(load):
    backend = load(options=LoadOptions(max_num_seqs=1), engine=EngineOptions(max_num_queued=1))
    for request, param in ((ask(prompt=[]), "prompt"), (ask(prompt=[1] * 64), "prompt"), (ask(prompt=[258]), "prompt")):
        with pytest.raises(InvalidRequest) as caught:
            backend.submit([request], queue.SimpleQueue())
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="ids must differ"):
        backend.submit([ask("same"), ask("same")], queue.SimpleQueue())
    with pytest.raises(Overloaded):
        backend.submit([ask(str(i)) for i in range(3)], queue.SimpleQueue())
    assert backend._engine.calls == []


def test_adapters_go_to_vllm_by_path_with_a_number_for_each_load(load, tmp_path):
    rows = np.ones((4, 8), np.float32)
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    save_file({names[0]: rows, names[1]: rows.T.copy()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    plain = load(family="a family we do not know")
    with pytest.raises(InvalidRequest, match="--enable_lora"):
        plain.load_adapter("tuned", tmp_path)
    backend = load(options=LoadOptions(max_adapters=2, max_lora_rank=20), family="a family we do not know")
    args = backend._engine.args
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 2, 32)
    for name in ("tuned", "other", "tuned"):
        backend.load_adapter(name, tmp_path)
    assert list(backend.adapters()) == ["tuned", "other"]
    for adapter in ("tuned", None, "other"):
        request = ask(adapter or "base")
        request.adapter = adapter
        list(backend.generate([request]))
    assert backend._engine.loras == [("tuned", 3, str(tmp_path)), None, ("other", 2, str(tmp_path))]
    backend.unload_adapter("tuned")
    request.adapter = "tuned"
    with pytest.raises(InvalidRequest, match="no adapter is called 'tuned'; there is other"):
        list(backend.generate([request]))
    with pytest.raises(InvalidRequest, match="no such folder"):
        backend.load_adapter("gone", tmp_path / "gone")
    with pytest.raises(UsageError, match="up to 512"):
        load(options=LoadOptions(max_adapters=1, max_lora_rank=600))
    with pytest.raises(UsageError, match="merges no adapters"):
        load(merge=tmp_path)
