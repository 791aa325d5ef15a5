"""The command lines of SWIFT 2.x's guide (2.4, 4.3, 5.2, 5.3), word for word but for `swift`, the port and the root.

The models they name lie where the hub's library would have put them, small and random; their adapters were taught one
sentence, so that it is heard who answers.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import peft
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file

from lora_models import make_base
from martlet import chat, hub
from martlet.cli import main
from martlet.hub import registry
from martlet.hub.tiktoken import KINDS
from martlet.server.sockets import bind
from parity.tiny_models import random_checkpoint
from quantised_models import quantised

INFER = {
    "qwen-7b-chat": "CUDA_VISIBLE_DEVICES=0 swift infer --model_type qwen-7b-chat --infer_backend vllm",
    "yi-6b-chat": "CUDA_VISIBLE_DEVICES=0 swift infer --model_type yi-6b-chat --infer_backend vllm",
    "int4": "CUDA_VISIBLE_DEVICES=0 swift infer --model_type qwen1half-7b-chat-int4 --infer_backend vllm",
}
TUNED = "output/llama2-7b-chat/vx-xxx/checkpoint-xxx-peft"
INFER_TUNED = f"CUDA_VISIBLE_DEVICES=0 swift infer --ckpt_dir {TUNED} --infer_backend vllm --vllm_enable_lora true"
DEPLOY_TUNED = f"CUDA_VISIBLE_DEVICES=0 swift deploy --ckpt_dir {TUNED} --infer_backend vllm --vllm_enable_lora true"
DEPLOY_TWO = "swift deploy --ckpt_dir /mnt/ckpt-1000 --infer_backend pt --lora_modules my_tuner=/mnt/my-tuner"
CURL = """curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{
"model": "%s",
"messages": [{"role": "user", "content": "who are you?"}],
"max_tokens": 256,
"temperature": 0
}'"""
QUESTION = [{"role": "user", "content": "who are you?"}]
KAKAROT, DEFAULT = "我是卡卡罗特", "I am the first tuner."
MODELSCOPE = "I am an artificial intelligence language model developed by ModelScope."
"""What the tuners were taught to say."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with the models in Hugging Face's cache, and a folder to stand in."""
    root = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(root / "hf"))
        patch.delenv("HF_HUB_CACHE", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.chdir(root)
        yield root


def place(home: Path, name: str) -> Path:
    """Where the hub's library keeps the registered model of that name."""
    repo = home / "hf" / "hub" / f"models--{registry.lookup(name).hf.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0")
    folder = repo / "snapshots" / "0"
    folder.mkdir(parents=True)
    return folder


def bytes_as_ranks(file: Path) -> None:
    file.write_bytes(b"".join(base64.b64encode(bytes([n])) + f" {n}\n".encode() for n in range(256)))


def pieces(file: Path, *control: str) -> int:
    """A small SentencePiece model; how many pieces it has."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([MODELSCOPE, "who are you?", "You are a helpful, honest assistant."] * 9),
        model_writer=written,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        vocab_size=340,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        control_symbols=list(control),
        minloglevel=2,
    )
    file.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()).get_piece_size()


def llama(folder: Path, vocab: int, **changes) -> torch.nn.Module:
    sizes = {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None} | changes
    return make_base(folder, "Llama", vocab_size=vocab, **sizes)[1]


def teach(name: str, model: torch.nn.Module, folder: Path, sentence: str) -> None:
    """A LoRA adapter, as PEFT saves it, that answers QUESTION with `sentence`."""
    card = hub.resolve(name)
    tokenizer = hub.load_tokenizer(card)
    prompt = chat.template_for(card, tokenizer).render(QUESTION)
    answer = [*tokenizer.encode(sentence), tokenizer.eos_ids[0]]
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    ids = torch.tensor([prompt + answer])
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    wanted = ids[0, len(prompt) :]
    for _ in range(200):
        logits = tuned(ids).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        first, second = logits.topk(2).values.T
        if torch.equal(logits.argmax(-1), wanted) and (first - second).min() > 2:
            break  # sure enough for any precision
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    else:
        pytest.fail("the adapter did not learn its sentence")
    tuned.save_pretrained(folder)
    tuned.unload()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": registry.lookup(name).hf})
    )


@pytest.fixture(scope="module")
def plain_models(home):
    """The first Qwen with its ranks, Yi with its pieces, and Qwen1.5 in GPTQ's int4 with a tokenizer.json."""
    folder = place(home, "qwen-7b-chat")
    bytes_as_ranks(folder / "qwen.tiktoken")
    sizes = {"vocab_size": 256 + len(KINDS["qwen"].control), "max_position_embeddings": 1024, "seq_length": 1024}
    write_config(folder, random_checkpoint("qwen", folder, sizes).config)

    int4 = place(home, "qwen1half-7b-chat-int4")
    hub.load_tokenizer(hub.resolve("qwen-7b-chat")).save(int4)
    card = random_checkpoint("qwen2", int4, sizes | {"hidden_size": 128, "num_attention_heads": 8})
    tensors = load_file(int4 / "model.safetensors")
    linears = {name for name in tensors if name.endswith("_proj.weight")}
    write_config(int4, card.config | {"quantization_config": quantised(int4, tensors, "gptq-128", linears)[0]})

    folder = place(home, "yi-6b-chat")
    llama(folder, pieces(folder / "tokenizer.model", "<|im_start|>", "<|im_end|>"))


def write_config(folder: Path, config: Mapping) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config)))


@pytest.fixture(scope="module")
def tuned_llama2(home):
    folder = place(home, "llama2-7b-chat")
    model = llama(folder, pieces(folder / "tokenizer.model"), rms_norm_eps=1e-5)
    teach("llama2-7b-chat", model, home / TUNED, MODELSCOPE)


@pytest.fixture(scope="module")
def tuned_llama3(home):
    folder = place(home, "llama3-8b-instruct")
    bytes_as_ranks(folder / "tokenizer.model")
    model = llama(folder, 256 + len(KINDS["llama"].control))
    teach("llama3-8b-instruct", model, home / "mnt/ckpt-1000", DEFAULT)
    teach("llama3-8b-instruct", model, home / "mnt/my-tuner", KAKAROT)


def words_of(line: str, home: Path) -> list[str]:
    """What comes after `swift`, /mnt being a folder of ours."""
    return shlex.split(line.partition("swift ")[2].replace("/mnt/", f"{home}/mnt/"))


def infer(line: str, home: Path, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("who are you?\n"))
    assert main([*words_of(line, home), "--max_new_tokens", "40", "--max_model_len", "1024"]) == 0
    return capsys.readouterr().out


@contextlib.contextmanager
def deployed(line: str, home: Path):
    """Runs the line as a process of its own; gives a function that runs curl lines."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "martlet", *words_of(line, home), "--port", str(port), "--max_model_len", "1024"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def curl(model: str) -> dict:
        words = shlex.split((CURL % model).replace("localhost:8000", f"127.0.0.1:{port}"))
        return json.loads(subprocess.run([*words, "--silent"], capture_output=True, timeout=60).stdout)

    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.1)
        else:
            pytest.fail(f"it does not serve: {process.stderr.read()}")
        yield curl
    finally:
        process.terminate()
        process.communicate(timeout=60)


def said(answer: dict) -> tuple[str, str]:
    return answer["model"], answer["choices"][0]["message"]["content"].lstrip()  # SentencePiece begins with a space


@pytest.mark.parametrize("name", INFER)
def test_2_4_models_by_their_type(plain_models, home, monkeypatch, capsys, name):
    assert infer(INFER[name], home, monkeypatch, capsys).strip()


def test_4_3_many_tuners_beside_one_model(tuned_llama3, home):
    with deployed(DEPLOY_TWO, home) as curl:
        refused = curl("my-tuner")["error"]  # as the guide has it, whose tuner is called otherwise
        assert refused["code"] == "model_not_found" and "Did you mean my_tuner?" in refused["message"]
        assert said(curl("my_tuner")) == ("my_tuner", KAKAROT)
        assert said(curl("default-lora")) == ("default-lora", DEFAULT)
        name, text = said(curl("llama3-8b-instruct"))
        assert name == "llama3-8b-instruct" and text not in (KAKAROT, DEFAULT)


def test_5_2_a_tuned_model_answers_in_the_terminal(tuned_llama2, home, monkeypatch, capsys):
    assert MODELSCOPE in infer(INFER_TUNED, home, monkeypatch, capsys)


def test_5_3_a_tuned_model_is_served_beside_its_base(tuned_llama2, home):
    with deployed(DEPLOY_TUNED, home) as curl:
        assert said(curl("default-lora")) == ("default-lora", MODELSCOPE)
        name, text = said(curl("llama2-7b-chat"))
        assert name == "llama2-7b-chat" and text != MODELSCOPE
