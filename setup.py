"""What pyproject.toml cannot say: recipes and documentation go into the package, and compiled kernels into a wheel.

With ATMA_BUILD_NATIVE=1 a wheel carries a library of the CPU kernels for every instruction level of this machine, and
is for its platform; the kernels know nothing of Python, so it is one for every version. Without, it is for any
platform, and the kernels are compiled where they are first used.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = os.environ.get("ATMA_BUILD_NATIVE", "") not in ("", "0")
INSIDE = {"recipes": ("**/*.toml",), "docs": ("**/*.md", "**/*.png", "**/*.svg")}


class BuildPackage(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "atma"
        for folder, patterns in INSIDE.items():
            shutil.rmtree(package / folder, ignore_errors=True)
            for pattern in patterns:
                for file in sorted((ROOT / folder).glob(pattern)):
                    to = package / folder / file.relative_to(ROOT / folder)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, to)
        libraries = package / "ops" / "native" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)  # of another build, or of `atma compile`
        if NATIVE:
            _kernels(libraries)


class BuildWheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class Package(Distribution):
    def has_ext_modules(self):
        return NATIVE


def _kernels(folder):
    spec = importlib.util.spec_from_file_location("levels", ROOT / "src" / "atma" / "ops" / "native" / "levels.py")
    levels = importlib.util.module_from_spec(spec)
    sys.modules["levels"] = levels
    spec.loader.exec_module(levels)
    levels.build(os.environ.get("CXX") or "c++", levels.of_machine(), folder, print)


setup(distclass=Package, cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
