"""Small model files that the hub's tests read: made here, so that nothing has to be fetched."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np

BYTE_CHARACTERS = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
ALPHABET = BYTE_CHARACTERS + [chr(256 + i) for i in range(256 - len(BYTE_CHARACTERS))]
SPACE = "Ġ"
CONTROL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def bpe_tokens() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary of 3 control tokens, 256 bytes and two merged words, with its merges."""
    merges = ["h e", "l l", "he ll", "hell o", f"{SPACE} he"]
    return [*CONTROL, *ALPHABET, "he", "ll", "hell", "hello", f"{SPACE}he"], merges


def write_gguf(path: Path, *, tokenizer: str = "gpt2", quantised: str = "Q4_1", **changes: object) -> dict:
    """A GGUF file of a tiny llama. Returns its tensors as float32. changes: metadata to add or to replace."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    fields: dict[str, object] = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    } | changes
    for key, value in fields.items():
        _add(writer, key, value)
    if tokenizer == "gpt2":
        tokens, merges = bpe_tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        writer.add_chat_template(TEMPLATE)
    elif tokenizer == "llama":
        tokens, types, scores = sentencepiece_tokens()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    kind = getattr(gguf.GGMLQuantizationType, quantised)
    tensors = {
        "token_embd.weight": random.standard_normal((8, 64), np.float32),
        "blk.0.attn_q.weight": random.standard_normal((64, 64), np.float32),
        "blk.0.attn_norm.weight": np.ones(64, np.float32),
        "output_norm.weight": np.ones(64, np.float32),
    }
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and quantised != "F32":
            packed = gguf.quants.quantize(tensor, kind)
            tensors[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def sentencepiece_tokens() -> tuple[list[str], list[int], list[float]]:
    """A SentencePiece vocabulary: 3 control tokens, 256 bytes, letters, a few joined pieces with scores."""
    pieces = ["▁", *"helowrd", "ll", "he", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return tokens, types, scores


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file by hand, so that tests may also write wrong ones. tensors: name -> dtype, shape, bytes."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_folder(folder: Path, *, config: dict | None = None, weights: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8} | (config or {})))
    if weights:
        write_safetensors(folder / "model.safetensors", {"a.weight": ("F32", [2, 2], bytes(16))})
    return folder
