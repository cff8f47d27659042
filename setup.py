"""The build's one hook: a wheel carries registry/, model_zoo/ and eval/ as data under laavit/_data/.

Everything else is said in pyproject.toml. An editable install copies nothing: there ``laavit.paths`` finds the folders
beside the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DATA = ("registry", "model_zoo", "eval")


class BuildWithData(build_py):
    """``build_py``, and then the data folders."""

    def run(self) -> None:
        """Copy the data folders beside the modules that were built; a missing one stops the build."""
        super().run()
        if self.editable_mode:
            return
        for name in DATA:
            target = Path(self.build_lib) / "laavit" / "_data" / name
            # a second build into the same folder must not keep what has been deleted since
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


setup(cmdclass={"build_py": BuildWithData})
