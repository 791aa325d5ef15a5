"""A tokenizer whose tokens are bytes: 0-255 stand for themselves, 256 ends an answer, 257 begins a text."""

from __future__ import annotations

EOS, BOS = 256, 257


class ByteTokenizer:
    vocab_size = 258
    bos_id = BOS
    eos_ids = (EOS,)
    special_ids = frozenset((EOS, BOS))
    add_bos = False
    chat_template = None
    special_tokens = {"eos_token": "<eos>", "bos_token": "<bos>"}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids, *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i < 256 or not skip_special).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else (b"<eos>" if token == EOS else b"<bos>")

    def token_id(self, token: str) -> int | None:
        return {"<eos>": EOS, "<bos>": BOS}.get(token)
