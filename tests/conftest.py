import ctypes.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "sim"))  # the fake runner serves several rooms' tests

# Where there is no GPU, Triton kernels run under its interpreter, which must be on before anybody imports triton.
if ctypes.util.find_library("cuda") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
