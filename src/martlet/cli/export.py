"""`martlet export`: merge an adapter, quantise, write GGUF, upload."""

from __future__ import annotations

import importlib.util

from martlet.cli import swift_flags
from martlet.cli.flags import Command
from martlet.errors import BackendUnavailable
from martlet.export.arguments import ExportArguments


def run(options: ExportArguments) -> int:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"export needs {', '.join(missing)}: pip install 'martlet[transformers]'")
    from martlet.cli.progress import layer_bar
    from martlet.export.run import export

    with layer_bar("quantising") as progress:
        print(export(options, progress))
    return 0


COMMAND = Command(
    "Turn a checkpoint into what others read: merged, quantised, GGUF, or uploaded.",
    ExportArguments,
    run,
    not_yet=swift_flags.EXPORT,
    startup_log=True,
)
