"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from martlet.hub.tokenizer import Tokenizer
from martlet.runners.base import TokenLogprobs


def token_name(raw: bytes) -> str:
    """A token as text; one that is not whole characters is spelled out, so that two such tokens do not look alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999 for a token that could not come."""
    return logprob if logprob > -9999.0 else -9999.0


def chat_entries(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": token_name(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    return [
        entry(at.token, at.logprob)
        | {"top_logprobs": [entry(*top) for top in zip(at.top_ids.tolist(), at.top_logprobs.tolist(), strict=True)]}
        for at in entries
    ]


class CompletionLogprobs:
    """The four parallel lists of a completion choice. text_offset counts the characters that stand before a token,
    so it runs on from chunk to chunk. `hidden` tokens are not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, hidden: frozenset[int]):
        self._tokenizer = tokenizer
        self._top = top
        self._hidden = hidden
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def block(self, tokens: Iterable[int], entries: Iterable[TokenLogprobs | None]) -> dict[str, Any]:
        """entries: None for a first prompt token, of which nothing can be known."""
        names, logprobs, tops, offsets = [], [], [], []
        for token, entry in zip(tokens, entries, strict=True):
            raw = self._tokenizer.token_bytes(token)
            names.append(token_name(raw))
            offsets.append(self._offset)
            if token not in self._hidden:
                self._offset += len(self._decode(raw))
            logprobs.append(None if entry is None else _finite(entry.logprob))
            tops.append(None if entry is None or not self._top else self._top_of(entry))
        return {
            "tokens": names,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _top_of(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in zip(entry.top_ids.tolist(), entry.top_logprobs.tolist(), strict=True):
            top.setdefault(token_name(self._tokenizer.token_bytes(token)), _finite(logprob))
        top.setdefault(token_name(self._tokenizer.token_bytes(entry.token)), _finite(entry.logprob))
        return top
