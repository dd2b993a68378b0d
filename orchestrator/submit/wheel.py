"""This project as a wheel, made from whatever is installed: no build tool, no network, the same bytes each
time.

The same bytes matter: Ray keeps packages by their hash, so that an unchanged wheel is neither sent nor
unpacked a second time.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from ..errors import ClusterError

NAME = "raypeft"
PACKAGES = ("orchestrator", "peft_dist")
_LEFT_OUT = {"__pycache__"}
_WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_wheel() -> tuple[str, bytes]:
    """The wheel's file name and its content.

    Raises:
        ClusterError: this project runs without being installed, so that nothing says what it depends on.
    """
    installed = _distribution()
    info = f"{NAME}-{installed.version}.dist-info"
    files = {name: content for package in PACKAGES for name, content in _files(package).items()}
    files[f"{info}/METADATA"] = _text(installed, "METADATA", "PKG-INFO").encode()
    files[f"{info}/WHEEL"] = f"{_WHEEL}Generator: {NAME} {installed.version}\n".encode()
    if points := _text(installed, "entry_points.txt"):
        files[f"{info}/entry_points.txt"] = points.encode()
    record = f"{info}/RECORD"
    sums = [_record(name, content) for name, content in sorted(files.items())]
    files[record] = "".join([*sums, f"{record},,\n"]).encode()
    return f"{NAME}-{installed.version}-py3-none-any.whl", zip_bytes(files)


def requirements() -> list[str]:
    """What the project needs at run time, as written in its metadata: `ray[train,...]>=2.60`, ..."""
    return [line for line in _distribution().requires or [] if "extra ==" not in line]


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """A zip of `files` that depends on nothing but their names and content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def _distribution() -> Distribution:
    try:
        return distribution(NAME)
    except PackageNotFoundError as error:
        raise ClusterError(
            f"{NAME} is not installed in this environment, so a wheel of it cannot be made.",
            hint="Install it: pip install .",
        ) from error


def _text(installed: Distribution, *names: str) -> str:
    """The first of the distribution's files that is there; an editable install from source has PKG-INFO."""
    return next((text for name in names if (text := installed.read_text(name))), "")


def _files(package: str) -> dict[str, bytes]:
    """Every file of the package by its name in the wheel."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    return {
        f"{package}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not _LEFT_OUT.intersection(path.parts)
    }


def _record(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"
