"""Tiktoken files: one line a token, its bytes in base 64 and its rank, and nothing about the text around it.

How a text is cut before merging, and the control tokens behind the ranks, stand in each family's own code; here they
are data. Sources: tokenization_qwen.py of Qwen-7B, tokenizer.py of Llama 3, tokenization_chatglm.py of GLM-4-9B.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from martlet.errors import CheckpointError
from martlet.hub.byte_level import CHARACTERS
from martlet.hub.gguf_tokenizer import LLAMA3, QWEN2

MAX_TOKEN = 1024  # bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """pattern: of the words that are merged for themselves. control: tokens that follow the ranks. composed: text is
    put into Unicode's NFC first. begin: control tokens that a raw prompt begins with."""

    pattern: str
    control: tuple[str, ...]
    names: dict[str, str]
    composed: bool = False
    begin: tuple[str, ...] = ()


_LLAMA3_CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)
_GLM4_CONTROL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
KINDS = {
    "qwen": Kind(
        QWEN2,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        composed=True,
    ),
    "llama": Kind(
        LLAMA3,
        _LLAMA3_CONTROL,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        begin=("<|begin_of_text|>",),
    ),
    "chatglm": Kind(
        LLAMA3,
        _GLM4_CONTROL,
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        begin=("[gMASK]", "<sop>"),
    ),
}
"""By the family of the model, as config.json names it."""


def is_tiktoken(file: Path) -> bool:
    """Whether a tokenizer.model is of this kind: its first line is text and ends in the rank 0 or 1."""
    with file.open("rb") as opened:
        first = opened.readline(4 * MAX_TOKEN).split()
    return len(first) == 2 and first[1].isdigit() and first[0].isascii()


def tokenizer_of(file: Path, kind: Kind) -> Tokenizer:
    """Raises CheckpointError, naming the line, for a file that cannot be read."""
    ranks = read(file)
    spelt = {token: "".join(CHARACTERS[byte] for byte in token) for token in ranks}
    # The library merges the pairs it is given, tiktoken any pair whose whole has a rank: all such pairs, in its order.
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((spelt[left], spelt[right]))
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    # A word that has a rank is that token, whatever its merges would give.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    if kind.composed:
        tokenizer.normalizer = normalizers.NFC()
    cut_up = pre_tokenizers.Split(Regex(kind.pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut_up, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in kind.control])
    return tokenizer


def read(file: Path) -> dict[bytes, int]:
    """Rank of each token, 0, 1, ... without a gap, every single byte among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{file}, line {number}: no token in base 64 and rank ({error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{file}: the ranks of its tokens are not 0, 1, ... each once")
    if max(map(len, ranks), default=0) > MAX_TOKEN or not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{file}: tokens for single bytes are missing, or one is longer than {MAX_TOKEN} bytes")
    return ranks
