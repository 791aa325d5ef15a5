"""One process or several: NPROC_PER_NODE (and NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT) start torchrun, as in SWIFT.

The parent makes the run's folder and tells the workers of it in a file; Ctrl-C and SIGTERM reach the workers through
their process group, so that none is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from martlet import errors
from martlet.errors import MartletError
from martlet.train import checks, layout
from martlet.train.arguments import RlhfArguments, SftArguments
from martlet.train.run import Result, place, prepare_only, restored, train

TASK, RESULT = "task.json", "result.json"
KINDS = {kind.__name__: kind for kind in (SftArguments, RlhfArguments)}


def launch(arguments: SftArguments) -> Result | None:
    """Train with as many processes as the environment asks for; None with --check. Raises what `train` does.

    DeepSpeed wants torchrun even for one: without its variables it looks for MPI.
    """
    processes = checks.number("NPROC_PER_NODE")
    nodes = checks.number("NNODES")
    arguments = restored(arguments)
    if (processes == 1 and nodes == 1 and not arguments.deepspeed) or "LOCAL_RANK" in os.environ:
        return train(arguments)
    if arguments.check:
        checks.refuse_values(arguments)
        return prepare_only(arguments)
    checks.refuse(arguments)
    resumed, run = place(arguments)
    words = {"kind": type(arguments).__name__, "arguments": dataclasses.asdict(arguments), "run": str(run)}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.nullcontext() if resumed else layout.gone_when_nothing_came_of_it(run),
    ):
        told = Path(folder)
        (told / TASK).write_text(json.dumps(words), encoding="utf-8")
        code = _run_workers(folder, processes, nodes)
        for file in sorted(told.glob("error-*")):
            error = json.loads(file.read_text("utf-8"))
            raise getattr(errors, error["kind"])(error["message"], param=error["param"])
        if code:
            raise MartletError(f"training ended with code {code}; what happened stands above")
        result = told / RESULT
        return Result(**json.loads(result.read_text("utf-8"))) if result.exists() else None


def _run_workers(folder: str, processes: int, nodes: int) -> int:
    """torchrun's exit code."""
    port = os.environ.get("MASTER_PORT")
    command = [sys.executable, "-m", "martlet.train.launch", "--nproc_per_node", str(processes)]
    if nodes == 1:
        command += ["--standalone"] if port is None else ["--master_port", port]
    else:
        command += ["--nnodes", str(nodes), "--node_rank", os.environ.get("NODE_RANK", "0")]
        command += ["--master_addr", os.environ.get("MASTER_ADDR", "127.0.0.1"), "--master_port", port or "29500"]
    environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)), **os.environ}
    workers = subprocess.Popen(
        [*command, "-m", "martlet.train.launch", folder], env=environment, start_new_session=True
    )
    before = signal.signal(signal.SIGTERM, lambda *_: os.killpg(workers.pid, signal.SIGTERM))
    try:
        return workers.wait()
    except KeyboardInterrupt:
        os.killpg(workers.pid, signal.SIGINT)
        workers.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if workers.poll() is None:
            os.killpg(workers.pid, signal.SIGKILL)


def _torchrun(words: list[str]) -> None:
    """torchrun itself, which a signal ends without a traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main

    try:
        main(words)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _worker(folder: str) -> None:
    """What torchrun runs in each process. Its result, or what was wrong, becomes a file in `folder`."""
    import torch

    told, rank = Path(folder), os.environ["RANK"]
    if rank == "0":
        logging.basicConfig(format="%(message)s")
        logging.getLogger("martlet").setLevel(logging.INFO)
    words: dict[str, Any] = json.loads((told / TASK).read_text("utf-8"))
    kind, run = KINDS[words["kind"]], Path(words["run"])
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in words["arguments"].items()}
    if torch.cuda.is_available() and values["device"] != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        found = train(kind(**values), run=run)
    except KeyboardInterrupt:
        sys.exit(130)
    except MartletError as error:
        words = {"kind": type(error).__name__, "message": error.message, "param": error.param}
        (told / f"error-{rank}").write_text(json.dumps(words), encoding="utf-8")
        # Before the first step all processes find the same and end; torchrun need not tell of it a second time.
        sys.exit(error.exit_code if (run / layout.LOG).exists() else 0)
    if found is not None and rank == "0":
        (told / RESULT).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    _worker(sys.argv[1]) if "LOCAL_RANK" in os.environ else _torchrun(sys.argv[1:])
