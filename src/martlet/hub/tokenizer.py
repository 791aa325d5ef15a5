"""Text to token ids and back. A thin face over the `tokenizers` library, whatever file the vocabulary came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from martlet.errors import CheckpointError
from martlet.hub.byte_level import BYTES
from martlet.hub.card import ModelCard
from martlet.hub.files import read_json

if TYPE_CHECKING:
    import tokenizers

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>")
"""Tokens that end an answer when the chat template writes them, whatever the configs forget to say."""

WORLD_SIZE = 65536
WORLD_VOCABULARY = ("rwkv-world-vocabulary", "rwkv==0.8.32", "rwkv/rwkv_vocab_v20230424.txt")
"""Where the vocabulary of RWKV's World models travels: name in our cache, package, file in it."""

_LONG = 8192
"""Characters that take so long to encode that other threads must run meanwhile, which the library's encode prevents."""

_BYTE_PIECE = r"<0x([0-9A-Fa-f]{2})>"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """What every room may ask of a tokenizer. Immutable and safe to use from several threads.

    vocab_size: size of the token table (ids are below it). bos_id: begin-of-sequence token or None.
    eos_ids: tokens that end an answer (from generation_config, tokenizer config and GGUF metadata together).
    special_ids: control tokens. add_bos: whether a raw prompt starts with bos_id. chat_template: Jinja source from the
    checkpoint. special_tokens: bos_token, eos_token, ... as template variables. begin: what a raw prompt starts with
    where that is not just bos_id.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        **facts: Any,
    ):
        """facts: as for `_describe`."""
        added = core.get_added_tokens_decoder()
        self._core = core
        self._literal = literal_twin(core, added)
        self._piece_bytes = byte_level_bytes if _is_byte_level(core) else _sentencepiece_bytes
        self._frame = _encoder_frame(core, special_tokens or {})
        self._describe(
            {token: item.content for token, item in added.items()},
            [token for token, item in added.items() if item.special],
            max(core.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1),
            special_tokens=special_tokens,
            **facts,
        )

    def _describe(
        self,
        added: dict[int, str],
        special: Iterable[int],
        vocab_size: int,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        begin: Sequence[int] = (),
    ) -> None:
        """Set what is the same whoever encodes. added: tokens that are found before a text is cut, and their names."""
        self._added = added
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for: every token of every stream is
        self.vocab_size = vocab_size
        self.special_ids = frozenset(special)
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self._begin = list(begin) or ([bos_id] if self.add_bos and bos_id is not None else [])
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        spelled = [self.token_id(name) for name in END_OF_TURN if name in (chat_template or "")]
        self.eos_ids: tuple[int, ...] = tuple(
            sorted({token for token in (*eos_ids, *spelled) if token is not None and 0 <= token < self.vocab_size})
        )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without bos. special=False: text that spells a control token stays text."""
        core, text = self._core if special else self._literal, encodable(text)
        if len(text) > _LONG:
            return core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return core.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw prompt as the model expects it: control tokens are read, bos added if the model wants one.

        A prompt that already begins with bos gets no second one. For an encoder, the text between its two marks.
        """
        if self._frame:
            return [self._frame[0], *self.encode(text), self._frame[1]]
        ids = self.encode(text, special=True)
        return ids if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self._core.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes a token stands for in the middle of a text; for a control token, its name.

        Empty for an id without a token (rows that pad a model's embedding).
        """
        found = self._bytes.get(token)
        if found is None:
            piece = self._piece(token)
            if token in self._added:
                found = self._added[token].encode()
            else:
                found = b"" if piece is None else self._piece_bytes(piece)
            self._bytes[token] = found
        return found

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its name, e.g. "<|im_end|>"."""
        return self._core.token_to_id(token)

    def _piece(self, token: int) -> str | None:
        """How the vocabulary spells a token."""
        return self._core.id_to_token(token)

    def state(self) -> dict[str, Any]:
        """What tokenizer.json holds."""
        return json.loads(self._core.to_str())

    def pre_tokenize(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """The words that `text` is cut into before merging, and where they lie; all of it when nothing cuts it."""
        cutter = self._core.pre_tokenizer
        return [(text, (0, len(text)))] if cutter is None else cutter.pre_tokenize_str(text)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers and we read them."""
        self._core.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos, **self.special_tokens}
        if self.eos_ids:
            settings.setdefault("eos_token", self._piece(self.eos_ids[0]))
        text = json.dumps(settings | {"clean_up_tokenization_spaces": False}, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def load_tokenizer(card: ModelCard) -> Tokenizer:
    """The tokenizer that came with a model. CheckpointError when there is none; prompts of ids work without one.

    RWKV's World models share one vocabulary, so it is fetched for those that did not bring it.
    """
    if card.path.suffix == ".gguf":
        return _from_gguf(card)
    if card.family.startswith("rwkv") and not (card.path / "tokenizer.json").is_file():
        return _world(card)
    return _from_folder(card)


def _world(card: ModelCard) -> Tokenizer:
    from martlet.hub import pypi
    from martlet.hub.world_tokenizer import WorldTokenizer, find_vocabulary, read_vocabulary

    file = find_vocabulary(card.path)
    if file is None and card.config.get("vocab_size") != WORLD_SIZE:
        raise CheckpointError(
            f"{card.path} has no tokenizer.json and no rwkv_vocab*.txt, so text cannot be read, and its "
            f"{card.config.get('vocab_size')} tokens are not the {WORLD_SIZE} of the World vocabulary. Prompts of ids "
            "still work"
        )
    tokens = read_vocabulary(file or pypi.fetch_file(*WORLD_VOCABULARY))
    return WorldTokenizer(tokens, chat_template=folder_chat_template(card.path))


def _from_gguf(card: ModelCard) -> Tokenizer:
    from martlet.hub import gguf_tokenizer
    from martlet.hub.gguf_header import TOKENS, read_header

    header = read_header(card.path)
    size = header.count(TOKENS)
    ids = {
        name: token
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if isinstance(token := header.get(f"tokenizer.ggml.{name}_token_id"), int) and 0 <= token < size
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    template = header.get("tokenizer.chat_template")
    facts = {
        "bos_id": ids.get("bos"),
        "eos_ids": [ids[name] for name in ("eos", "eot", "eom") if name in ids],
        "add_bos": gguf_tokenizer.wants_bos(header),
        "chat_template": template if isinstance(template, str) else None,
        "special_tokens": {k: header.items(TOKENS, [ids[name]])[0] for k, name in names.items() if name in ids},
    }
    merges = gguf_tokenizer.merges_from(header)
    if merges is None:
        return Tokenizer(gguf_tokenizer.tokenizer_from(header), **facts)
    from martlet.hub.byte_level_tokenizer import ByteLevelTokenizer

    return ByteLevelTokenizer(header, merges, **facts)


def _from_folder(card: ModelCard) -> Tokenizer:
    core, defaults = _vocabulary(card)
    settings = read_json(card.path / "tokenizer_config.json", missing={})
    special_tokens = {**defaults.names, **_special_tokens(card.path, settings)}
    by_name = {name: core.token_to_id(text) for name, text in special_tokens.items()}
    bos_id = by_name.get("bos_token")
    if bos_id is None:
        bos_id = _token_ids(card.generation_config.get("bos_token_id", card.config.get("bos_token_id")))[0:1]
        bos_id = bos_id[0] if bos_id else None
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        add_bos = defaults.add_bos or core.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    eos = [by_name.get("eos_token"), *_token_ids(card.config.get("eos_token_id"))]
    eos += _token_ids(card.generation_config.get("eos_token_id"))
    return Tokenizer(
        core,
        bos_id=bos_id,
        eos_ids=[token for token in eos if token is not None],
        add_bos=bool(add_bos),
        chat_template=folder_chat_template(card.path),
        special_tokens=special_tokens,
        begin=[token for name in defaults.begin if (token := core.token_to_id(name)) is not None],
    )


class _Defaults(NamedTuple):
    """What goes with a vocabulary file where the folder's other files do not say. begin: tokens before a raw prompt."""

    names: Mapping[str, str]
    add_bos: bool = False
    begin: tuple[str, ...] = ()


# Tokens that ChatGLM3's own code puts behind the pieces of its tokenizer.model.
_CHATGLM3_CONTROL = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)


def _vocabulary(card: ModelCard) -> tuple[tokenizers.Tokenizer, _Defaults]:
    """From the folder's tokenizer.json, a *.tiktoken file, or a tokenizer.model of either kind, in that order."""
    import tokenizers

    from martlet.hub import sentencepiece, tiktoken

    if (file := card.path / "tokenizer.json").is_file():
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise CheckpointError(f"{file} is not a readable tokenizer: {error}") from error
        core.no_padding()
        core.no_truncation()
        return core, _Defaults({})
    model = card.path / "tokenizer.model"
    for file in (*sorted(card.path.glob("*.tiktoken")), model):
        if file.is_file() and (file != model or tiktoken.is_tiktoken(file)):
            kind = tiktoken.KINDS.get(card.family)
            if kind is None:
                raise CheckpointError(
                    f"{file}: how models of family {card.family!r} cut a text is not known; a tokenizer.json would say"
                )
            return tiktoken.tokenizer_of(file, kind), _Defaults(kind.names, begin=kind.begin)
    if not model.is_file():
        raise CheckpointError(
            f"{card.path} has no tokenizer.json, tokenizer.model or *.tiktoken, so text cannot be read. Prompts of ids "
            "still work; transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a tokenizer.json"
        )
    found = sentencepiece.read(model)
    core = sentencepiece.tokenizer_of(found.pieces, model)
    if card.family == "chatglm":
        core.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in _CHATGLM3_CONTROL])
        return core, _Defaults(found.names, begin=("[gMASK]", "sop"))
    return core, _Defaults(found.names, add_bos="bos_token" in found.names)


def folder_chat_template(folder: Path) -> str | None:
    """Jinja source from chat_template.jinja or tokenizer_config.json (the one named "default" of several)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json", missing={}).get("chat_template")
    if isinstance(template, list):  # [{"name": ..., "template": ...}, ...]
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    table = {**read_json(folder / "special_tokens_map.json", missing={}), **settings}
    tokens = {name: table.get(name) for name in _SPECIAL_NAMES}
    spelled = {name: item.get("content") if isinstance(item, dict) else item for name, item in tokens.items()}
    return {name: text for name, text in spelled.items() if isinstance(text, str)}


def _token_ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def _encoder_frame(core: tokenizers.Tokenizer, names: dict[str, str]) -> tuple[int, int] | None:
    """The marks before and after a text of a BERT-like tokenizer, [CLS] and [SEP]; None for any other."""
    if "cls_token" not in names or "sep_token" not in names:
        return None
    frame = core.encode("", add_special_tokens=True).ids
    return (frame[0], frame[1]) if len(frame) == 2 else None


def literal_twin(core: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """A tokenizer that reads control tokens as text. It shares the vocabulary, so it costs next to nothing."""
    import tokenizers

    twin = tokenizers.Tokenizer(core.model)
    twin.normalizer, twin.pre_tokenizer, twin.decoder = core.normalizer, core.pre_tokenizer, core.decoder
    twin.add_tokens([added[token] for token in sorted(added)])
    found = twin.get_added_tokens_decoder()
    if {k: v.content for k, v in found.items()} != {k: v.content for k, v in added.items()}:  # ids with gaps
        twin = tokenizers.Tokenizer.from_str(core.to_str())
    twin.encode_special_tokens = True
    if isinstance(core.model, tokenizers.models.Unigram):  # its pieces hold the control tokens, and it would find them
        from martlet.hub.sentencepiece import cut_names

        cuts = cut_names(item.content for item in added.values() if item.special)
        twin.pre_tokenizer = (
            cuts if core.pre_tokenizer is None else tokenizers.pre_tokenizers.Sequence([cuts, core.pre_tokenizer])
        )
    return twin


def encodable(text: str) -> str:
    """`text` with halves of surrogate pairs joined where they meet and replaced where they are alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_byte_level(core: tokenizers.Tokenizer) -> bool:
    state = b"" if core.decoder is None else core.decoder.__getstate__()
    return '"ByteLevel"' in json.dumps(json.loads(state or b"null"))


def byte_level_bytes(piece: str) -> bytes:
    if all(character in BYTES for character in piece):
        return bytes(BYTES[character] for character in piece)
    return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if match := re.fullmatch(_BYTE_PIECE, piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()
