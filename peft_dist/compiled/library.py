"""A C++ file of this folder as a loaded library, compiled once for each kind of machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-march=native")
_WITHIN_S = 120
_log = logging.getLogger(__name__)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of `NAME.cpp`; None where there is none, so that the caller does without.

    What was compiled is kept in `$XDG_CACHE_HOME/peft_dist` (`~/.cache/peft_dist` where that is not set). The compiler
    is that of `CXX`, or else `c++`, `g++` or `clang++`. With `PEFT_DIST_COMPILED=0` in the environment nothing is
    compiled, nor loaded.
    """
    if os.environ.get("PEFT_DIST_COMPILED") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        _log.warning(
            "%s is slower than it could be: it could not be compiled (%s)", name, str(said).strip()[-500:]
        )
        return None


def function(name: str, which: str, *arguments: Any) -> Any | None:
    """A function of a `library`, which gives nothing back, called with these ctypes; None where there is no library."""
    compiled = library(name)
    if compiled is None:
        return None
    found = getattr(compiled, which)
    found.argtypes, found.restype = arguments, None
    return found


def _compiled(source: Path) -> Path:
    compiler = _compiler()
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, compiler, *_FLAGS, _processor()]).encode()).hexdigest()
    folder = _cache()
    made = folder / f"{source.stem}-{key[:16]}.so"
    if made.exists():
        return made
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        new = Path(aside) / made.name
        subprocess.run(
            [compiler, *_FLAGS, str(source), "-o", str(new)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_WITHIN_S,
        )
        new.replace(made)
    return made


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise OSError("there is no C++ compiler: install g++ or clang++, or name one in CXX")


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "peft_dist"


def _processor() -> str:
    """What code for this machine may use: homes are shared between machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
