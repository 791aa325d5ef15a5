"""Code in a model's folder is never run, whoever reads the folder, and whatever its files ask for."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_models import make_base, tune
from martlet import backends, chat, hub
from martlet.engine.request import Request
from martlet.errors import MartletError
from martlet.runners.base import LoadOptions
from martlet.sampling_params import SamplingParams

FILES = ("modeling_evil", "configuration_evil", "tokenization_evil", "generate")
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}
ASKS = {
    "config.json": {"auto_map": AUTO_MAP, "trust_remote_code": True, "custom_generate": "generate.py"},
    "tokenizer_config.json": {"auto_map": AUTO_MAP, "tokenizer_class": "Evil"},
    "generation_config.json": {"trust_remote_code": True, "custom_generate": "generate.py"},
}


@pytest.fixture
def folder(tmp_path):
    """A model that works, beside code that leaves a file called ran, and configurations that ask for this code."""
    folder = tmp_path / "model"
    make_base(folder, vocab_size=256)
    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    poison(folder)
    yield folder
    assert not (tmp_path / "ran").exists(), "code of the folder was run"


def poison(folder):
    for name in FILES:
        (folder / f"{name}.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\nclass Evil: ...\n")
    shutil.copytree(folder, folder / "custom_generate", ignore=lambda _, names: set(names) - {"generate.py"})
    for name, more in ASKS.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**known, **more}))


def answer(folder, kind, **more):
    card = hub.resolve(str(folder))
    load = LoadOptions(device="cpu", dtype="float32", kv_cache_tokens=256, max_model_len=64, max_num_seqs=2, **more)
    adapters = {"a": str(folder / "adapter")} if more else {}
    backend = backends.load(card, backend=kind, load=load, adapters=adapters)
    try:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        adapter = "a" if more else None
        ids = backend.tokenizer.encode("hello")
        request = Request("r", ids, params, adapter=adapter)
        return [token for output in backend.generate([request]) for token in output.token_ids]
    finally:
        backend.close()


@pytest.mark.parametrize("kind", ["native", "pt"])
def test_a_model_is_served_without_its_code(folder, kind):
    assert len(answer(folder, kind)) == 4


@pytest.mark.parametrize("kind", ["native", "pt"])
def test_nor_does_an_adapter_bring_any(folder, tmp_path, kind):
    _, model = make_base(tmp_path / "plain", vocab_size=256)
    adapter = tune(model, folder / "adapter").path
    poison(adapter)
    asks = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"}, "auto_map": AUTO_MAP}
    known = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(known | asks))
    assert len(answer(folder, kind, max_adapters=1)) == 4
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["native", "pt"])
def test_a_model_that_is_nothing_without_its_code_is_refused_by_name(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "architectures": ["Evil"]}))
    with pytest.raises(MartletError, match="'evil'") as caught:
        answer(folder, kind)
    assert "trust_remote_code" not in caught.value.message


def test_nor_is_a_chat_template_more_than_a_template(folder):
    (folder / "chat_template.jinja").write_text("{% import 'modeling_evil.py' as evil %}{{ evil.Evil() }}")
    card = hub.resolve(str(folder))
    with pytest.raises(MartletError):
        chat.template_for(card, hub.load_tokenizer(card)).render([{"role": "user", "content": "a"}])
