"""What paging wastes and sharing saves, in the engine's own pool."""

from __future__ import annotations

import pytest

from martlet import cli
from martlet.bench import memory


def test_waste_is_below_four_percent_from_200_tokens_on():
    waste = memory.measure_waste()
    assert waste.mean_length >= 200 and waste.sequences == 64
    assert waste.measured < 0.04
    assert waste.measured == pytest.approx(waste.formula, abs=0.002)
    assert waste.contiguous > 0.8


def test_larger_blocks_waste_more():
    assert memory.measure_waste(32).measured > 1.5 * memory.measure_waste(16).measured


def test_six_samples_of_a_prompt_twice_as_long_save_half():
    sharing = memory.measure_sharing(6, 256, 128)
    assert sharing.unshared == 6 * (256 + 128) // 16
    assert sharing.saved >= 0.5
    assert sharing.formula == pytest.approx(5 * 256 / (6 * 384))
    assert memory.measure_sharing(1, 256, 128).saved == 0


def test_the_command_prints_both(capsys):
    assert cli.main(["bench", "memory"]) == 0
    said = capsys.readouterr().out
    assert "wasted by blocks of 16" in said and "saved by sharing" in said
