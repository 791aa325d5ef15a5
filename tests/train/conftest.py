import json

import pytest
import torch

from martlet import hub


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a llama of a few hundred thousand random weights and SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = hub.load_tokenizer(hub.resolve("smollm2-135m-instruct"))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "top_p": 0.9, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Preference rows whose chosen answers differ from the rejected ones in an obvious way."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"query": f"say {n}", "response": f"yes {n}", "rejected_response": f"no {n}"} for n in range(24)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another are slow on a busy machine, and these models need only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
