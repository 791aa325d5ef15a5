"""The flag parser: SWIFT's spelling rules, typed values, and messages a person can act on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from martlet.cli.flags import HelpAsked, flag, parse, usage
from martlet.errors import UsageError


@dataclass(frozen=True)
class Shared:
    """Shared things."""

    max_new_tokens: int = flag("longest answer", 2048)
    temperature: float | None = flag("heat", None)
    backend: str = flag("who answers", "auto", choices=("auto", "native", "vllm"))
    stop_words: tuple[str, ...] = flag("stops", ())
    do_sample: bool | None = flag("sample or not", None)


@dataclass(frozen=True)
class Options(Shared):
    """Own things."""

    stream: bool = flag("as it comes", True)
    utilization: float = flag("share", 0.9, aliases=("gpu_memory_utilization",))
    workloads: tuple[str, ...] = flag("which", (), commas=True)


@dataclass(frozen=True)
class Named:
    """Named."""

    name: str = flag("the model's name", positional=True)
    force: bool = flag("do it", False)


def test_defaults_stand_when_nothing_is_said():
    assert parse(Options, []) == Options()


@pytest.mark.parametrize("words", [["--max-new-tokens", "7"], ["--max_new_tokens", "7"], ["--max-new_tokens=7"]])
def test_dash_underscore_and_equals_are_the_same(words):
    assert parse(Options, words).max_new_tokens == 7


@pytest.mark.parametrize(
    ("words", "stream"),
    [
        (["--stream"], True),
        (["--stream", "false"], False),
        (["--stream", "False"], False),
        (["--stream=false"], False),
        (["--stream", "true"], True),
        (["--stream", "--temperature", "0"], True),
    ],
)
def test_booleans_stand_alone_or_take_a_word(words, stream):
    assert parse(Options, words).stream is stream


def test_a_boolean_that_is_not_given_stays_none():
    assert parse(Options, []).do_sample is None
    assert parse(Options, ["--do_sample"]).do_sample is True


def test_lists_take_words_up_to_the_next_flag_and_may_be_repeated():
    got = parse(Options, ["--stop_words", "a b", "-", "--temperature", "1", "--stop-words=c,d"])
    assert got.stop_words == ("a b", "-", "c,d")
    assert got.temperature == 1.0
    assert parse(Options, ["--workloads", "W1,W2", "W3"]).workloads == ("W1", "W2", "W3")


def test_values_may_begin_with_a_dash():
    got = parse(Options, ["--temperature", "-1", "--stop_words=--stream", "---", "--max_new_tokens", "-5"][:3])
    assert got.temperature == -1
    assert got.stop_words == ("--stream",)
    assert parse(Options, ["--stop_words", "---"]).stop_words == ("---",)


def test_aliases_fill_the_field():
    assert parse(Options, ["--gpu-memory-utilization", "0.5"]).utilization == 0.5


def test_choices_ignore_case():
    assert parse(Options, ["--backend", "AUTO"]).backend == "auto"


def test_positional_words():
    assert parse(Named, ["qwen", "--force"]) == Named(name="qwen", force=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tempratur", "1"], "unknown flag --tempratur. Did you mean --temperature?"),
        (["--zzzzzz"], "unknown flag --zzzzzz."),
        (["--max_new_tokens", "many"], "--max_new_tokens wants a whole number, got 'many'"),
        (["--max_new_tokens", "1.5"], "--max_new_tokens wants a whole number, got '1.5'"),
        (["--temperature=warm"], "--temperature wants a number, got 'warm'"),
        (["--temperature"], "--temperature needs a value (a number)"),
        (["--temperature", "--stream"], "--temperature needs a value (a number)"),
        (["--stream=maybe"], "--stream wants true or false, got 'maybe'"),
        (["--backend", "vlm"], "--backend must be one of auto, native, vllm, got 'vlm'. Did you mean vllm?"),
        (["--stream", "maybe"], "unexpected word 'maybe': values follow a flag (--flag value)"),
        (["--sft_type", "lora"], "--sft_type is a SWIFT flag that is not supported yet"),
    ],
)
def test_messages(words, message):
    with pytest.raises(UsageError) as caught:
        parse(Options, words, not_yet={"sft_type"})
    assert str(caught.value) == message


def test_a_missing_word_is_named():
    with pytest.raises(UsageError, match=r"^NAME is missing: the model's name$"):
        parse(Named, [])


def test_help_groups_flags_by_the_class_that_declares_them(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(HelpAsked):
        parse(Options, ["--stream", "--help"])
    text = usage("martlet try", "Try it.", Options)
    assert text.startswith("usage: martlet try [flags]\n\nTry it.\n\nOwn things:\n")
    assert "  --max_new_tokens N            longest answer (default: 2048)\n" in text
    assert "  --backend auto|native|vllm    who answers (default: auto)\n" in text
    assert (
        text.index("Own things:")
        < text.index("--stream")
        < text.index("Shared things:")
        < text.index("--max_new_tokens")
    )
    assert max(map(len, text.splitlines())) <= 100
    assert usage("martlet x", "X.", Named).startswith("usage: martlet x NAME [flags]\n")
