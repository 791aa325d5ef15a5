"""A tokenizer from the vocabulary inside a GGUF file.

Two kinds cover the decoders: `gpt2` (byte-level BPE with a merge list, split first by a pattern that
`tokenizer.ggml.pre` names) and `llama` (SentencePiece: pieces with scores, bytes for what has no piece).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from martlet.errors import CheckpointError
from martlet.hub import kept_merges
from martlet.hub.gguf_header import TOKENS, GGUFHeader
from martlet.hub.kept_merges import Merges
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

SMALLEST = 10_000  # tokens: the library reads smaller vocabularies at once anyway
_KIND, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"


def tokenizer_from(header: GGUFHeader) -> Tokenizer:
    """The file's tokenizer. CheckpointError when it has none or one of a kind that is not supported."""
    kind = header.get(_KIND)
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
    return header.get(_KIND) == "llama" or header.get(_PRE) in WHOLE_WORDS_FIRST


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = header.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError(f"{header.path}: {TOKENS} is missing or no list of strings")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise CheckpointError(f"{header.path}: a token has more than {MAX_TOKEN} characters; the file is corrupt")
    return tokens


def _types(header: GGUFHeader) -> np.ndarray:
    count, types = header.count(TOKENS), header.get("tokenizer.ggml.token_type")
    types = np.full(count, NORMAL, np.int32) if types is None else np.asarray(types)
    if len(types) != count:
        raise CheckpointError(f"{header.path}: {count} tokens but {len(types)} token types")
    return types


def _vocabulary(header: GGUFHeader, tokens: list[str]) -> dict[str, int]:
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{header.path}: {TOKENS} holds {len(tokens) - len(vocabulary)} duplicates")
    return vocabulary


def merges_from(header: GGUFHeader) -> Merges | None:
    """What a byte-level vocabulary is merged by, kept from an earlier start or made; None for one that is small, of
    another kind, or has to be read by the library. CheckpointError as from tokenizer_from."""
    if header.get(_KIND) != "gpt2" or header.count(TOKENS) < SMALLEST or not header.is_indexed(TOKENS):
        return None
    _patterns(header)
    with _fitting(header):
        return kept_merges.merges_of(header.path, lambda: _model(header))


def cutter_of(header: GGUFHeader, alphabet: list[str]) -> Tokenizer:
    """What cuts a text into control tokens and words as `tokenizer_from` does, and merges nothing: the characters of
    its words are numbered by their place in `alphabet`, control tokens after them."""
    return _byte_level(header, models.BPE({character: token for token, character in enumerate(alphabet)}, []))


def takes_whole_words(header: GGUFHeader) -> bool:
    """Whether a word that is a token is taken as it is, without merging."""
    return header.get(_PRE) in WHOLE_WORDS_FIRST


def _byte_level(header: GGUFHeader, model: models.BPE | None = None) -> Tokenizer:
    patterns = _patterns(header)
    if model is None:
        with _fitting(header):
            model = models.BPE(*_model(header), fuse_unk=False, ignore_merges=takes_whole_words(header))
    tokenizer = Tokenizer(model)
    if header.get(_PRE) in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, header)
    return tokenizer


def _patterns(header: GGUFHeader) -> tuple[str, ...]:
    pre = str(header.get(_PRE, "default"))
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{header.path}: unknown pre-tokenizer {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Prompts of ids still work"
        )
    return PRE_TOKENIZERS[pre]


def _model(header: GGUFHeader) -> kept_merges.Vocabulary:
    return _vocabulary(header, _tokens(header)), header.pairs("tokenizer.ggml.merges")


@contextmanager
def _fitting(header: GGUFHeader) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception: a merge of pieces that are not tokens
        raise CheckpointError(f"{header.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error


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
    added = zip(header.items(TOKENS, indices), types[indices] != USER_DEFINED, strict=True)
    tokenizer.add_tokens(
        [AddedToken(token, special=bool(special), normalized=False) for token, special in added if token]
    )
