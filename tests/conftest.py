import ctypes.util
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "sim"))  # the fake runner serves several rooms' tests

# Where there is no GPU, Triton kernels run under its interpreter, which must be on before anybody imports triton.
if ctypes.util.find_library("cuda") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a shell starts in the background ignores Ctrl-C and so would every program that tests start to send it one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = ("parity/test_greedy.py", "train/test_train.py", "cpu/test_cpu_runner.py", "sim/test_simulator.py")


def pytest_collection_modifyitems(items):
    """Files that take longest go first: the other worker has something to do until the end."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}

    def place(item):
        return rank.get("/".join(item.path.parts[-2:]), len(rank))

    items.sort(key=place)


@pytest.fixture(scope="module")
def a_core_of_its_own(worker_id):
    """Where pytest-xdist's workers share the machine, each takes one core: threads that fight for cores wait idly."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker_id == "master" or len(cores) < 2:
        yield
        return
    import torch

    os.sched_setaffinity(0, {cores[int(worker_id.removeprefix("gw")) % len(cores)]})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)
