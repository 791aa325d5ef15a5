"""One process or several: NPROC_PER_NODE (and NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT) start torchrun, as in SWIFT.

The parent makes the run's folder and tells the workers of it in a file; Ctrl-C and SIGTERM reach the workers through
their process group, so that none is left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from martlet.errors import MartletError, UsageError
from martlet.train.arguments import RlhfArguments, SftArguments

KINDS = {kind.__name__: kind for kind in (SftArguments, RlhfArguments)}


def launch(arguments: SftArguments):
    """Train with as many processes as the environment asks for; the Result, or None with --check."""
    from martlet.train.run import place, prepare_only, restored, train

    processes = _number("NPROC_PER_NODE")
    nodes = _number("NNODES")
    if (processes == 1 and nodes == 1) or "LOCAL_RANK" in os.environ:
        return train(arguments)
    arguments = restored(arguments)
    if arguments.check:
        return prepare_only(arguments)
    _, run = place(arguments)
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        words = {"kind": type(arguments).__name__, "arguments": dataclasses.asdict(arguments), "run": str(run)}
        task.write_text(json.dumps(words), encoding="utf-8")
        _run_workers([str(task), str(result)], processes, nodes)
        from martlet.train.run import Result

        return Result(**json.loads(result.read_text("utf-8"))) if result.exists() else None


def _number(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.isdigit() or not int(text):
        raise UsageError(f"{variable} must be a whole number above 0, got {text!r}", param=variable)
    return int(text)


def _run_workers(words: list[str], processes: int, nodes: int) -> None:
    port = os.environ.get("MASTER_PORT")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    if nodes == 1:
        command += ["--standalone"] if port is None else ["--master_port", port]
    else:
        command += ["--nnodes", str(nodes), "--node_rank", os.environ.get("NODE_RANK", "0")]
        command += ["--master_addr", os.environ.get("MASTER_ADDR", "127.0.0.1"), "--master_port", port or "29500"]
    environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)), **os.environ}
    workers = subprocess.Popen(
        [*command, "-m", "martlet.train.launch", *words], env=environment, start_new_session=True
    )
    before = signal.signal(signal.SIGTERM, lambda *_: os.killpg(workers.pid, signal.SIGTERM))
    try:
        code = workers.wait()
    except KeyboardInterrupt:
        os.killpg(workers.pid, signal.SIGINT)
        workers.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if workers.poll() is None:
            os.killpg(workers.pid, signal.SIGKILL)
    if code:
        raise MartletError(f"training ended with code {code}; what happened stands above")


def _worker(task: str, result: str) -> None:
    """What torchrun runs in each process."""
    import torch

    from martlet.train.run import train

    words: dict[str, Any] = json.loads(Path(task).read_text("utf-8"))
    kind = KINDS[words["kind"]]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in words["arguments"].items()}
    if torch.cuda.is_available() and values["device"] != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    found = train(kind(**values), run=Path(words["run"]))
    if found is not None and os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
