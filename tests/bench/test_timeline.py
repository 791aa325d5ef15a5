"""Figures from known times."""

from __future__ import annotations

import pytest

from martlet.bench.offline import Result
from martlet.bench.report import lines, table
from martlet.bench.timeline import Timeline, figures, fingerprint, medians
from martlet.errors import MartletError


def test_one_request():
    t = Timeline(10.0, 100)
    for i in range(5):
        t.add(10.5 + 0.1 * i, 1, [i])
    got = figures([t])
    assert got == pytest.approx(
        {
            "ttft_ms": 500,
            "itl_ms": 100,
            "decode_tok_s": 10,  # four tokens in 0.4 s: the first one is prefill's
            "prefill_tok_s": 200,
            "output_tok_s": 5 / 0.9,
            "seconds": 0.9,
            "new_tokens": 5,
        }
    )


def test_several_requests_are_timed_from_the_first_to_the_last():
    a, b = Timeline(0.0, 10, [1.0, 2.0], [1, 1]), Timeline(0.5, 10, [2.0, 4.0], [2, 4])
    got = figures([a, b])
    assert (got["seconds"], got["output_tok_s"]) == (4.0, 8 / 4.0)
    assert got["decode_tok_s"] == (1 / 1.0 + 4 / 2.0) / 2


def test_a_request_without_an_answer_is_an_error():
    with pytest.raises(MartletError, match="no token"):
        figures([Timeline(0.0, 1)])


def test_medians_and_fingerprints():
    assert medians([{"a": 1.0}, {"a": 9.0}, {"a": 2.0}]) == {"a": 2.0}
    one, other = Timeline(0, 1, [1], [2], [5, 6]), Timeline(0, 1, [1], [2], [5, 7])
    assert fingerprint([one]) == fingerprint([one]) != fingerprint([other])
    assert fingerprint([Timeline(0, 1, [1], [1])]) == ""


def test_the_table_has_ratios_to_the_first_engine():
    def result(engine: str, rate: float, ttft: float, peak: float) -> Result:
        return Result(engine, "m", "W1", [{"decode_tok_s": rate, "ttft_ms": ttft}], peak)

    out = table([result("native", 100.0, 50.0, 200.0), result("other", 50.0, 100.0, 400.0)])
    cells = [list(column.cells) for column in out.columns]
    assert cells[0] == ["W1 time to first token, ms", "W1 decode, tok/s", "W1 peak memory, MB"]
    assert cells[1] == ["50.0", "100.0", "200"]
    assert cells[2] == ["100.0  (0.50x)", "50.0  (0.50x)", "400  (0.50x)"]


def test_lines_carry_medians_runs_machine_and_command():
    import json

    result = Result("native", "m", "W1", [{"seconds": 1.0}, {"seconds": 3.0}, {"seconds": 2.0}])
    (line,) = lines([result], {"cpu": "x"})
    row = json.loads(line)
    assert row["figures"] == {"seconds": 2.0}
    assert len(row["runs"]) == 3 and row["machine"] == {"cpu": "x"} and row["command"].startswith("martlet")
