"""Text to token ids and back. A thin face over the `tokenizers` library, whatever file the vocabulary came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What every room may ask of a tokenizer. Implementations are immutable and safe to use from several threads.

    vocab_size: size of the token table (ids are below it). bos_id: begin-of-sequence token or None.
    eos_ids: tokens that end an answer (from generation_config, tokenizer config and GGUF metadata together).
    special_ids: control tokens. add_bos: whether a raw prompt starts with bos_id.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_ids: frozenset[int]
    add_bos: bool
    chat_template: str | None  # Jinja source from the checkpoint
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as template variables

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without bos. special=False: text that spells a control token stays text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw prompt as the model expects it: control tokens are read, bos added if the model wants one."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes a token stands for in the middle of a text; for a control token, its name."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its name, e.g. "<|im_end|>"."""
        ...
