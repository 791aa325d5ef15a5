"""The native library: found, built when need be, opened with ctypes. ctypes lets go of the GIL for every call."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_int, c_int64, c_void_p

import numpy as np

from martlet.errors import BackendUnavailable
from martlet.kernels.cpu import build
from martlet.kernels.cpu.program import PANEL, Batch, Format, Matrix, Op, Program

ISAS = ("generic", "avx2", "avx512_vnni", "avx512_bf16", "amx")
SPINS = 4000  # polls before a waiting thread sleeps: 50-200 us, more than the gaps within a step

_SIGNATURES = {
    "martlet_widest_isa": (c_int, []),
    "martlet_fastest_isa": (c_int, []),
    "martlet_open": (c_void_p, [c_int, c_int, c_int]),
    "martlet_close": (None, [c_void_p]),
    "martlet_panel_bytes": (c_int64, [c_int, c_int64]),
    "martlet_source_row_bytes": (c_int64, [c_int, c_int64]),
    "martlet_pack": (None, [c_void_p, c_int, c_int, c_void_p, c_int64, c_int64, c_void_p]),
    "martlet_begin": (None, [c_void_p, POINTER(Op), c_int, POINTER(Batch)]),
    "martlet_help": (None, [c_void_p]),
    "martlet_finish": (None, [c_void_p]),
    "martlet_screen_rows": (c_int, [c_void_p, c_int]),
    "martlet_screen": (None, [c_void_p, POINTER(Matrix), c_void_p]),
    "martlet_run": (None, [c_void_p, POINTER(Op), c_int, POINTER(Batch)]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The opened library. Raises BackendUnavailable when it is not built and cannot be."""
    try:
        handle = ctypes.CDLL(str(build.ensure()))
    except (build.BuildError, OSError) as error:
        raise BackendUnavailable(f"the native CPU kernels are not available: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
    return handle


def widest_isa() -> str:
    """The widest instruction set that this processor runs and the library holds, one of ISAS."""
    return ISAS[library().martlet_widest_isa()]


def panel_bytes(target: Format, inputs: int) -> int:
    """Bytes of one packed panel: 32 outputs of `inputs` inputs each."""
    return library().martlet_panel_bytes(target, inputs)


def source_row_bytes(source: Format, inputs: int) -> int:
    """Bytes of one row of `inputs` weights as a file holds it."""
    return library().martlet_source_row_bytes(source, inputs)


class Executor:
    """A team of threads that runs programs. One call at a time; close it when done.

    The thread that calls is one of the team. `run` keeps it to the end of a step; with `begin` the others start alone,
    and it joins them with `help` and `finish` when it has time. One step at a time: beginning the next, packing and
    closing finish the one under way.

    isa: one of ISAS, None for the fastest here. Raises BackendUnavailable when this processor cannot run it.
    """

    def __init__(self, threads: int, *, cores: int | None = None, isa: str | None = None):
        self.threads, self._handle, self._process = threads, None, os.getpid()
        self._used: tuple[object, ...] = ()  # what the step under way reads and writes
        self.isa = isa or ISAS[library().martlet_fastest_isa()]
        spins = SPINS if threads <= (cores or threads) else 0  # a spinning thread would keep another from its core
        self._handle = library().martlet_open(threads, spins, ISAS.index(self.isa))
        if not self._handle:
            raise BackendUnavailable(f"this processor runs {widest_isa()} at most, not {self.isa}")

    def pack(self, source: Format, target: Format, rows: np.ndarray, inputs: int, out: np.ndarray) -> None:
        """Pack rows of `inputs` weights into panels.

        rows: uint64 [32 * panels], addresses of rows in the layout of `source`, 0 for a row of zeros. out: uint8
        [panels * panel_bytes(target, inputs)].
        """
        panels, odd = divmod(len(rows), PANEL)
        if odd or len(out) != panels * panel_bytes(target, inputs):
            raise ValueError(f"{len(rows)} rows and {len(out)} bytes are no whole panels of {target.name}")
        self.finish()
        library().martlet_pack(self._handle, source, target, rows.ctypes.data, panels, inputs, out.ctypes.data)

    def screen_rows(self, head: Format) -> int:
        """Rows of a step up to which a screen of a head in this format pays; 0 where none does."""
        return library().martlet_screen_rows(self._handle, head)

    def screen(self, head: Matrix, out: np.ndarray) -> None:
        """Make the screen of a packed head: uint8 [panels * panel_bytes(Format.SCREEN, head.k)]."""
        if len(out) != -(-head.n // PANEL) * panel_bytes(Format.SCREEN, head.k):
            raise ValueError(f"{len(out)} bytes are no screen of {head.n} outputs")
        library().martlet_screen(self._handle, head, out.ctypes.data)

    def run(self, program: Program, batch: Batch) -> None:
        """Run every operation of the program for the batch; returns when all threads are done."""
        self.finish()
        library().martlet_run(self._handle, program.array, len(program), batch)

    def begin(self, program: Program, batch: Batch, used: object) -> None:
        """Start a step on the other threads and return. used: keeps alive what the batch points at.

        Nothing that the step reads or writes may be touched before `finish` has returned, or the next `begin`.
        """
        self._used = program, batch, used, self._used  # those of the step before, until it is finished
        library().martlet_begin(self._handle, program.array, len(program), batch)
        self._used = self._used[:3]

    def help(self) -> None:
        """Compute, too, until all but the last piece of the step, its head, is done."""
        if self._used:
            library().martlet_help(self._handle)

    def finish(self) -> None:
        """Compute, too, until the step is done. Nothing where none is under way."""
        if self._used:
            library().martlet_finish(self._handle)
            self._used = ()

    def close(self) -> None:
        """Stop the threads. Idempotent; nothing in a forked process, which has none of them."""
        if self._handle and os.getpid() == self._process:
            library().martlet_close(self._handle)
        self._handle, self._used = None, ()

    def __del__(self):
        self.close()
