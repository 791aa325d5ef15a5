"""Compiles csrc/cpu into one shared library. Standard library only: setup.py runs this file before martlet exists.

The library's name carries a hash of its sources, so an edited source is never answered by an old build. It is looked
for beside this file (`pip install` puts it there) and in the user's cache, where `ensure` builds it when need be. What
only building needs is imported there, since every start looks for the library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
KERNEL_SETS = {
    "x86_64": {
        "generic": [],
        "avx2": AVX2,
        "avx512_vnni": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    },
    "other": {"generic": []},
}


class BuildError(Exception):
    """No compiler, or it failed; the message is its last words."""


def sources() -> Path:
    """The folder of the C++ sources: beside this file in an installed package, else in the repository."""
    packaged = HERE / "csrc"
    return packaged if packaged.is_dir() else HERE.parents[3] / "csrc" / "cpu"


def library_name(folder: Path) -> str:
    """File name of the library that belongs to the sources in `folder`."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(folder.glob("*.?pp")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"martlet-cpu-{digest.hexdigest()[:16]}-{platform.machine().lower()}.so"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "martlet" / "cpu"


def find() -> Path | None:
    """The built library of the present sources, if there is one."""
    folder = sources()
    if not folder.is_dir():
        return next(iter(HERE.glob("martlet-cpu-*.so")), None)
    name = library_name(folder)
    return next((path for path in (HERE / name, cache_folder() / name) if path.is_file()), None)


def ensure() -> Path:
    """The library, built into the user's cache when there is none. Raises BuildError."""
    return find() or compile_library(cache_folder())


def compiler() -> str:
    """A C++ compiler. Raises BuildError when the path holds none."""
    import shutil

    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler found (looked for c++, g++ and clang++)")


def compile_library(target: Path) -> Path:
    """Compile into the folder `target` and return the library. Safe when several processes do it. Raises BuildError."""
    import shutil
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    folder, cxx = sources(), compiler()
    machine = platform.machine().lower()
    sets = dict(KERNEL_SETS["x86_64" if machine in ("x86_64", "amd64") else "other"])
    if not _knows(cxx, sets.get("amx", ["-mno-such-thing"])):
        sets.pop("amx", None)  # a compiler from before 2020: the library runs without it
    jobs = [
        ("kernels.cpp", name, [f"-DMARTLET_ISA=isa_{name}", f"-DMARTLET_SET={name}", *f]) for name, f in sets.items()
    ]
    jobs += [(path.name, path.stem, []) for path in sorted(folder.glob("*.cpp")) if path.name != "kernels.cpp"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, flags = job
            output = str(Path(scratch) / f"{name}.o")
            has = ["-DMARTLET_HAS_AMX"] if "amx" in sets else []
            _run([cxx, *COMMON, *has, *flags, "-c", str(folder / source), "-o", output])
            return output

        objects = list(pool.map(compile_one, jobs))
        built = Path(scratch) / "library.so"
        _run([cxx, "-shared", "-pthread", *objects, "-o", str(built)])
        try:
            target.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(dir=target)
            os.close(handle)
            shutil.copyfile(built, path)
            os.chmod(path, 0o755)
            os.replace(path, target / library_name(folder))
        except OSError as error:
            raise BuildError(f"cannot write to {target}: {error}") from error
    return target / library_name(folder)


def _knows(cxx: str, flags: list[str]) -> bool:
    """Whether the compiler takes these flags."""
    import subprocess

    command = [cxx, *flags, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")


if __name__ == "__main__":
    print(ensure(), file=sys.stderr)
