"""`martlet sft`: fine-tune a model on examples."""

from __future__ import annotations

import importlib.util

from martlet.cli import swift_flags
from martlet.cli.flags import Command
from martlet.errors import BackendUnavailable
from martlet.train.arguments import SftArguments

NEEDED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


def run(options: SftArguments) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"training needs {', '.join(missing)}: pip install 'martlet[train]'")
    from martlet.train.launch import launch

    result = launch(options)
    if result is not None:
        print(f"last checkpoint: {result.last_model_checkpoint}")
        print(f"best checkpoint: {result.best_model_checkpoint or result.last_model_checkpoint}")
    return 0


COMMAND = Command(
    "Fine-tune a model on conversations: an adapter (LoRA) or all weights.",
    SftArguments,
    run,
    not_yet=swift_flags.SFT,
    startup_log=True,
)
