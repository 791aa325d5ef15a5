"""A tokenizer with one token a byte and the control tokens of every named template."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from martlet.hub.tokenizer import Tokenizer as OurTokenizer

CONTROL = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[gMASK]",
    "sop",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)


def byte_tokenizer(chat_template: str | None = None) -> OurTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return OurTokenizer(
        core,
        bos_id=core.token_to_id("<s>"),
        eos_ids=[core.token_to_id("</s>")],
        chat_template=chat_template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )
