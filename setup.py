"""Puts the quickstart's base and data, which live in jobs/assets, into the built package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithAssets(build_py):
    """`orchestrator/templates/assets` of a wheel is `jobs/assets` of the clone, without its scripts."""

    def run(self) -> None:
        """Builds the packages, then copies the assets."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "orchestrator" / "templates" / "assets"
            ignored = shutil.ignore_patterns("*.py", "__pycache__", ".*")
            shutil.copytree("jobs/assets", target, ignore=ignored, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithAssets})
