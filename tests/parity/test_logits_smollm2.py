"""The default model's golden numbers, measured once in float32 over the dequantised weights by another program.

A wrong rotary layout gives 3.935 for the likelihood and a plausible-looking answer: so both are checked.
"""

import numpy as np
import pytest
from tiny_models import Driver

from martlet import hub

TEXT = (
    "504 3575 282 4649 314 7042 30 378 3575 282 4521 314 11452 30 4643 36411 418 582 3822 5027 20590 28 284 43145 418 "
    "6708 30 533 216 33 41 38 41 260 808 701 13197 335 260 8872 30"
)
CHAT = (
    "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 "
    "1 4093 198 1780 314 260 3575 282 4649 47 2 198 1 520 9531 198"
)
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.<|im_end|>


def ids(text: str) -> np.ndarray:
    return np.array([int(word) for word in text.split()])


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_golden(dtype, close):
    options = {"max_num_seqs": 2, "max_model_len": 64, "kv_cache_tokens": 128, "block_size": 16}
    driver = Driver(hub.resolve("smollm2-135m-instruct"), dtype=dtype, **options)
    plain = {"logprobs": None, "prompt_logprobs": None}
    new = [driver.enter(0, ids(TEXT), prompt_logprobs=0, logprobs=None), driver.enter(1, ids(CHAT), **plain)]
    result = driver.step([(0, 41, False), (1, 37, True)], new)
    assert -np.mean([entry.logprob for entry in result.prompt_logprobs[0]]) == pytest.approx(2.588, abs=close)
    if dtype != "float32":  # the first two candidates are 0.1 apart: which one wins depends on the processor's rounding
        return
    answer = [int(result.tokens[1])]
    while answer[-1] != 2 and len(answer) < 20:
        answer.append(int(driver.step([(1, 1, True)]).tokens[0]))
    assert answer == ANSWER
