"""A tokenizer as GGUF metadata: byte-level BPE, or SentencePiece's kind with bytes for what has no piece."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGUFWriter

from martlet import hub
from martlet.errors import UsageError
from martlet.hub.gguf_tokenizer import COMPOSED, PRE_TOKENIZERS, WHOLE_WORDS_FIRST
from martlet.hub.resolver import card_of
from martlet.hub.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from martlet.hub.tokenizer import Tokenizer

PROBES = (
    "Hello, world! It's 2024: he'll pay 12345.67 $ (or €9)\n\n\tdef f(x):\r\n        return x**2  # don't\n",
    "Schöne Grüße, ÇA VA? naïve CamelCaseWord HTTPServer 東京タワー 你好，世界。 안녕하세요 привет мир مرحبا",
    "  leading and trailing   spaces  \n \n a/b/c...!!! <<>> 'S 'll \u200d👩‍💻🎉 e\u0301 1st 22nd 333rd",
)


def write(writer: GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    """Add the metadata for a table of `size` tokens. Raises UsageError for a kind that GGUF has no name for."""
    state = tokenizer.state()
    model = state["model"]
    if model.get("type") != "BPE":
        raise UsageError(f"tokenizers of kind {model.get('type')} cannot be told in a GGUF file", param="to")
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    pieces = {token: piece for piece, token in vocabulary.items()}
    added = {item["id"]: item for item in state["added_tokens"]}
    tokens, types = [], []
    for token in range(max(size, tokenizer.vocab_size)):
        item = added.get(token)
        tokens.append(item["content"] if item else pieces.get(token, f"[PAD{token}]"))
        if item:
            kind = CONTROL if item["special"] else USER_DEFINED
        else:
            kind = NORMAL if token in pieces else UNUSED
        types.append(UNKNOWN if tokens[-1] == model.get("unk_token") else kind)
    if model.get("byte_fallback"):
        types = [BYTE if kind == NORMAL and _is_byte(t) else kind for t, kind in zip(tokens, types, strict=True)]
        ranks: dict[str, int] = {}
        for left, right in merges:
            ranks.setdefault(left + right, len(ranks))
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        writer.add_add_space_prefix(_has_prefix(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(tokenizer, state))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {name: tokenizer.token_id(text) for name, text in tokenizer.special_tokens.items()}
    eos = ids.get("eos_token")
    if eos is None and tokenizer.eos_ids:
        eos = tokenizer.eos_ids[0]
    others = [token for token in tokenizer.eos_ids if token != eos]
    for token, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (others[0] if others else None, writer.add_eot_token_id),
        (ids.get("unk_token"), writer.add_unk_token_id),
        (ids.get("pad_token"), writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def check(path: Path, tokenizer: Tokenizer) -> None:
    """Raises UsageError when the file's tokenizer cuts a text otherwise than the model's own."""
    written = hub.load_tokenizer(card_of(path))
    for text in PROBES:
        if written.encode_prompt(text) != tokenizer.encode_prompt(text):
            raise UsageError(
                "the model's tokenizer cuts text in a way that GGUF has no name for; the file would answer wrongly",
                param="to",
            )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _has_prefix(state: dict) -> bool:
    """Whether a text gets a space before its first word."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _pre(tokenizer: Tokenizer, state: dict) -> str:
    """The name of the pattern that cuts the probes as the model's own does."""
    from tokenizers import Regex, pre_tokenizers

    whole, composed = bool(state["model"].get("ignore_merges")), (state.get("normalizer") or {}).get("type") == "NFC"
    for name, patterns in PRE_TOKENIZERS.items():
        if name == "default" or (name in WHOLE_WORDS_FIRST) != whole or (name in COMPOSED) != composed:
            continue
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if all(steps.pre_tokenize_str(text) == tokenizer.pre_tokenize(text) for text in PROBES):
            return name
    raise UsageError("GGUF has no name for the way in which this tokenizer cuts text into words", param="to")
