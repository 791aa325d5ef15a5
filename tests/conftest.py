import ctypes.util
import os
import signal
import sys
from pathlib import Path

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
