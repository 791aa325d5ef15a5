"""`martlet rlhf`: fine-tune a model on preferences. `martlet dpo` is the same with --rlhf_type dpo, and so on."""

from __future__ import annotations

from martlet.cli import swift_flags
from martlet.cli.flags import Command
from martlet.cli.sft import run
from martlet.train.arguments import RlhfArguments

COMMAND = Command(
    "Fine-tune a model on preferences: DPO, ORPO, SimPO, CPO or KTO.",
    RlhfArguments,
    run,
    not_yet=swift_flags.SFT,
    startup_log=True,
)
