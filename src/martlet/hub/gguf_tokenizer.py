"""A tokenizer from the vocabulary inside a GGUF file.

Two kinds cover the decoders: `gpt2` (byte-level BPE with a merge list, split first by a pattern that
`tokenizer.ggml.pre` names) and `llama` (SentencePiece: pieces with scores, bytes for what has no piece).
"""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from martlet.errors import CheckpointError
from martlet.hub import kept_bpe
from martlet.hub.gguf_header import GGUFHeader
from martlet.hub.token_types import CONTROL, MAX_TOKEN, NORMAL, UNKNOWN, USER_DEFINED

# Patterns a text is cut by before merging, applied one after another. Source: the tokenizer.json files of the models
# that the names stand for. GPT2 means the byte-level step's own pattern.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_TAIL_SLASH}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}{_TAIL_SLASH}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DIGITS_GPT2 = (r"\p{N}", _GPT2)
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "granite-docling", "trillion"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), (QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
}
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
"""Pre-tokenizers whose models take a word that is in the vocabulary as it is, without merging, and want a bos."""
COMPOSED = {"qwen2", "deepseek-r1-qwen"}
"""Pre-tokenizers whose models first compose characters (Unicode NFC)."""


def tokenizer_from(header: GGUFHeader) -> Tokenizer:
    """The file's tokenizer. CheckpointError when it has none or one of a kind that is not supported."""
    kind = header.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(header)
    if kind == "llama":
        return _sentencepiece(header)
    found = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}"
    raise CheckpointError(
        f"{header.path} holds {found}; kinds 'gpt2' and 'llama' can be read. Prompts of ids still work"
    )


def wants_bos(header: GGUFHeader) -> bool:
    """Whether a raw prompt begins with bos; files that do not say follow the custom of their kind."""
    said = header.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    return header.get("tokenizer.ggml.model") == "llama" or header.get("tokenizer.ggml.pre") in WHOLE_WORDS_FIRST


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = header.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.tokens is missing or no list of strings")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise CheckpointError(f"{header.path}: a token has more than {MAX_TOKEN} characters; the file is corrupt")
    return tokens


def _types(header: GGUFHeader) -> np.ndarray:
    count, types = header.count("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.token_type")
    types = np.full(count, NORMAL, np.int32) if types is None else np.asarray(types)
    if len(types) != count:
        raise CheckpointError(f"{header.path}: {count} tokens but {len(types)} token types")
    return types


def _vocabulary(header: GGUFHeader, tokens: list[str]) -> dict[str, int]:
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.tokens holds {len(tokens) - len(vocabulary)} duplicates")
    return vocabulary


def _byte_level(header: GGUFHeader) -> Tokenizer:
    pre = str(header.get("tokenizer.ggml.pre", "default"))
    patterns = PRE_TOKENIZERS.get(pre)
    if patterns is None:
        raise CheckpointError(
            f"{header.path}: unknown pre-tokenizer {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Prompts of ids still work"
        )

    def read() -> kept_bpe.Vocabulary:
        return _vocabulary(header, _tokens(header)), header.pairs("tokenizer.ggml.merges")

    settings = {"fuse_unk": False, "ignore_merges": pre in WHOLE_WORDS_FIRST}
    try:
        model = kept_bpe.model_of(header.path, header.count("tokenizer.ggml.tokens"), read, **settings)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception: a merge of pieces that are not tokens
        raise CheckpointError(f"{header.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, header)
    return tokenizer


def _sentencepiece(header: GGUFHeader) -> Tokenizer:
    from martlet.hub.sentencepiece import Pieces, tokenizer_of

    tokens, types = _tokens(header), _types(header)
    scores = header.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.scores is missing or not as long as the tokens")
    unknown = header.get("tokenizer.ggml.unknown_token_id")
    pieces = Pieces(
        tokens,
        types,
        np.asarray(scores),
        unknown=unknown if isinstance(unknown, int) and unknown < len(tokens) else None,
        prefix=bool(header.get("tokenizer.ggml.add_space_prefix", True)),
    )
    return tokenizer_of(pieces, header.path)


def _add_tokens(tokenizer: Tokenizer, header: GGUFHeader) -> None:
    types = _types(header)
    indices = np.flatnonzero((types == CONTROL) | (types == USER_DEFINED) | (types == UNKNOWN))
    added = zip(header.items("tokenizer.ggml.tokens", indices), types[indices] != USER_DEFINED, strict=True)
    tokenizer.add_tokens(
        [AddedToken(token, special=bool(special), normalized=False) for token, special in added if token]
    )
