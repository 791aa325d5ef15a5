"""Adapters of a real model, chosen by name: the openai client, LLM, SWIFT's functions, the command line."""

from __future__ import annotations

import json
import sys
from contextlib import closing

import numpy as np
import openai
import pytest
from live_server import live
from safetensors.numpy import save_file

from martlet import LLM, LoRARequest, SamplingParams, backends
from martlet.cli import main
from martlet.errors import InvalidRequest
from martlet.runners.base import LoadOptions
from martlet.server import create_app
from martlet.swift import LoRARequest as SwiftRequest
from martlet.swift import get_template, get_vllm_engine, inference_vllm

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHAPES = {"self_attn.v_proj": (192, 576), "self_attn.o_proj": (576, 576), "mlp.up_proj": (1536, 576)}


@pytest.fixture(scope="module")
def tuners(tmp_path_factory):
    """Two random adapters that change every answer."""
    root = tmp_path_factory.mktemp("tuners")
    for seed, name in enumerate(("my_tuner", "other")):
        rng, tensors = np.random.default_rng(seed), {}
        for n in range(30):
            for part, (rows, columns) in SHAPES.items():
                at = f"base_model.model.model.layers.{n}.{part}.lora_"
                tensors[at + "A.weight"] = (rng.standard_normal((8, columns)) / columns**0.5).astype(np.float32)
                tensors[at + "B.weight"] = (rng.standard_normal((rows, 8)) * 0.4).astype(np.float32)
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
        config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    return root


def test_the_openai_client_chooses_an_adapter_as_a_model(tuners):
    load = LoadOptions(device="cpu", kv_cache_tokens=2048, max_model_len=512, max_adapters=2)
    names = {name: tuners / name for name in ("my_tuner", "other")}
    with closing(backends.load(MODEL, load=load, adapters=names)) as backend:
        from martlet import chat

        app = create_app(backend, chat.template_for(backend.card, backend.tokenizer))
        with live(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            cards = {card.id: card for card in client.models.list()}
            assert [*cards] == [MODEL, "my_tuner", "other"] and cards["other"].parent == MODEL

            def ask(model: str):
                return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0)

            answers = {name: ask(name) for name in cards}
            assert [answer.model for answer in answers.values()] == [*cards]
            assert "Paris" in answers[MODEL].choices[0].message.content
            assert len({answer.choices[0].message.content for answer in answers.values()}) == 3
            with pytest.raises(openai.NotFoundError, match="Did you mean my_tuner"):
                ask("my-tuner")


def test_calls_name_adapters_as_in_vllm_and_swift(tuners):
    params = SamplingParams(temperature=0, max_tokens=8)
    mine = LoRARequest("mine", 1, str(tuners / "my_tuner"))
    small = {"device": "cpu", "kv_cache_tokens": 2048, "max_model_len": 512}
    with LLM(MODEL, enable_lora=True, max_loras=2, **small) as llm:
        base, tuned, again, other = llm.chat(
            [QUESTION] * 4, params, lora_request=[None, mine, mine, LoRARequest("other", 2, str(tuners / "other"))]
        )
        texts = [out.outputs[0].text for out in (base, tuned, other)]
        assert len(set(texts)) == 3 and "Paris" in texts[0]
        assert again.outputs[0].token_ids == tuned.outputs[0].token_ids
        swapped = LoRARequest("mine", 3, str(tuners / "other"))  # the name now stands for another folder
        (out,) = llm.chat(QUESTION, params, lora_request=swapped)
        assert out.outputs[0].token_ids == other.outputs[0].token_ids
        with pytest.raises(InvalidRequest, match="different adapters"):
            llm.chat([QUESTION] * 2, params, lora_request=[mine, swapped])
        with pytest.raises(InvalidRequest, match="no such folder"):
            llm.generate("a", params, lora_request=LoRARequest("gone", 4, str(tuners / "gone")))
    with get_vllm_engine(MODEL, enable_lora=True, max_loras=1, max_lora_rank=16, max_model_len=512) as engine:
        template = get_template("chatml", engine.hf_tokenizer)
        engine.generation_config.max_new_tokens, engine.generation_config.temperature = 8, 0
        asked = [{"query": QUESTION[0]["content"]}]
        lora = SwiftRequest("default-lora", 1, str(tuners / "my_tuner"))
        answers = [inference_vllm(engine, template, asked, lora_request=each)[0]["response"] for each in (lora, None)]
        assert answers[0] != answers[1]


def test_a_checkpoint_answers_with_its_adapter(tuners, capsys, monkeypatch):
    def answer(*words: str) -> str:
        monkeypatch.setattr(sys, "stdin", None)
        ask = ["--prompt", QUESTION[0]["content"], "--max_new_tokens", "8", "--temperature", "0", "--device", "cpu"]
        assert main(["infer", *words, *ask, "--max_model_len", "512"]) == 0
        return capsys.readouterr().out

    tuned = answer("--ckpt_dir", str(tuners / "my_tuner"), "--vllm_enable_lora", "true")
    assert tuned == answer("--adapters", f"a={tuners / 'my_tuner'}") != answer()
