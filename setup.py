"""Builds the native CPU kernels into the wheel; everything else is in pyproject.toml.

Where there is no compiler, or it fails, the package installs without them: the library is then built at first use if a
compiler has come, and else models run on torch.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
NATIVE = Path("martlet", "kernels", "cpu")


def builder():
    """martlet/kernels/cpu/build.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("martlet_cpu_build", ROOT / "src" / NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Adds the C++ sources and the library beside build.py; an editable install builds into the user's cache."""

    def run(self):
        super().run()
        build = builder()
        try:
            if self.editable_mode:
                build.ensure()
                return
            folder = Path(self.build_lib) / NATIVE
            shutil.copytree(ROOT / "csrc" / "cpu", folder / "csrc", dirs_exist_ok=True)
            build.compile_library(folder)
        except build.BuildError as error:
            self.warn(f"the native CPU kernels were not built ({error}); models will run on torch")


class SdistWithSources(sdist):
    def make_distribution(self):
        self.filelist.extend(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.?pp")))
        super().make_distribution()


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        """Wheels are for one platform."""
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        """The library knows nothing of Python: one wheel serves every version."""
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithKernels, "sdist": SdistWithSources, "bdist_wheel": PlatformWheel},
)
