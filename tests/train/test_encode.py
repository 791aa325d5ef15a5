"""What is learned: the assistant's words and the end of its turn, nothing else."""

import pytest

from martlet import chat, hub
from martlet.train.encode import Lengths, encode, prompt_and_endings, show
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
