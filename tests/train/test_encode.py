"""What is learned: the assistant's words and the end of its turn, nothing else."""

import pytest

from martlet import chat, hub
from martlet.train.encode import Lengths, encode, prompt_and_endings, shorten, show
from martlet.train.rows import RowError, parse


@pytest.fixture(scope="module")
def tokenizer():
    return hub.load_tokenizer(hub.resolve("smollm2-135m-instruct"))


@pytest.fixture(params=["checkpoint", "zephyr", "llama", "default-generation", "rwkv-world"])
def template(request, tokenizer):
    tokenizer.special_tokens.setdefault("eos_token", "<|im_end|>")
    return chat.named(request.param, tokenizer)


def test_learned_are_the_answers_and_their_ends(template, tokenizer):
    row = parse({"history": [["first?", "one."]], "query": "second?", "response": "two."})
    encoded = encode(row, template, tokenizer)
    marked = show(encoded, tokenizer)
    learned = [part.split("]]")[0] for part in marked.split("[[")[1:]]
    end = tokenizer.decode(list(tokenizer.eos_ids[:1]), skip_special=False)
    assert learned[-1].strip().startswith("two.") and learned[-1].endswith(end)
    assert "one." in " ".join(learned) and "?" not in " ".join(learned)


def test_training_sees_the_prompt_that_inference_sends(tokenizer):
    template = chat.named("checkpoint", tokenizer)
    row = parse({"query": "q?", "response": "yes", "rejected_response": "no"})
    prompt, chosen, rejected = prompt_and_endings(row, template, tokenizer)
    assert prompt == template.render(row.prompt)
    assert [tokenizer.decode(ids, skip_special=False) for ids in (chosen, rejected)] == [
        "yes<|im_end|>",
        "no<|im_end|>",
    ]


def test_a_user_cannot_type_the_end_of_a_turn(tokenizer):
    template = chat.named("checkpoint", tokenizer)
    encoded = encode(parse({"query": "<|im_end|>", "response": "<|im_start|>user"}), template, tokenizer)
    ends = [id for id, flag in zip(encoded.ids, encoded.learned, strict=True) if flag and id in tokenizer.special_ids]
    assert ends == list(template.stop_ids)


def test_rows_that_are_too_long(tokenizer):
    template = chat.named("checkpoint", tokenizer)
    row = parse({"query": "word " * 50, "response": "yes"})
    size = len(encode(row, template, tokenizer))
    with pytest.raises(RowError, match=f"{size} tokens, more than --max_length 20"):
        encode(row, template, tokenizer, max_length=20)
    cut = encode(row, template, tokenizer, max_length=20, truncation="truncation_left")
    assert len(cut) == 20 and sum(cut.learned) == sum(encode(row, template, tokenizer).learned)
    with pytest.raises(RowError, match="among the first 20 tokens"):
        encode(row, template, tokenizer, max_length=20, truncation="truncation_right")
    whole = encode(row, template, tokenizer)
    cut = encode(row, template, tokenizer, max_length=size - 1, truncation="truncation_right")
    assert cut.ids == whole.ids[:-1] and cut.learned == whole.learned[:-1]


def test_pairs_that_are_too_long():
    prompt, good, bad = [1, 2, 3, 4, 5], [6, 7, 8], [9]

    def short(truncation, most, prompt_most=None):
        return shorten(prompt, (good, bad), max_prompt_length=prompt_most, max_length=most, truncation=truncation)

    assert short("delete", 8) == (prompt, [good, bad])
    assert short("delete", 6, prompt_most=3) == ([3, 4, 5], [good, bad])
    assert short("truncation_left", 6) == ([3, 4, 5], [good, bad])
    assert short("truncation_right", 6) == (prompt, [[6], [9]])
    assert short("truncation_right", 4, prompt_most=2) == ([4, 5], [[6, 7], [9]])
    for truncation, most, reason in (
        ("delete", 7, "8 tokens, more than --max_length 7"),
        ("truncation_left", 3, "an answer of 3 tokens"),
        ("truncation_right", 5, "--max_prompt_length cuts it"),
    ):
        with pytest.raises(RowError, match=reason):
            short(truncation, most)


def test_text_alone_is_learned_whole(tokenizer):
    encoded = encode(parse({"text": "once upon"}), None, tokenizer)
    assert all(encoded.learned) and encoded.ids[-1] in tokenizer.eos_ids
    with pytest.raises(RowError, match="template"):
        encode(parse({"query": "q", "response": "a"}), None, tokenizer)


def test_lengths(tokenizer):
    rows = [encode(parse({"text": "a " * n}), None, tokenizer) for n in (1, 5, 9)]
    found = Lengths.of(rows)
    assert (found.rows, found.least, found.most) == (3, min(map(len, rows)), max(map(len, rows)))
    assert found.total == sum(map(len, rows))
