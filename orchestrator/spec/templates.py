"""The commented jobs of `raypeft init`, and the quickstart's base and data."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import SpecError, closest

_FOLDER = Path(__file__).parent.parent / "templates"
_PACKAGED = _FOLDER / "assets"
_IN_CLONE = Path(__file__).parent.parent.parent / "jobs" / "assets"

ASSETS = {"quickstart": ("tiny-llama", "python-docs.jsonl")}
"""What a template needs beside itself, below `assets/`."""


def list_templates() -> list[tuple[str, str]]:
    """(name, one line) of each template, the quickstart first."""
    names = sorted(
        (path.stem for path in _FOLDER.glob("*.yaml")), key=lambda name: (name != "quickstart", name)
    )
    return [(name, _first_line(_FOLDER / f"{name}.yaml")) for name in names]


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines).lstrip("# ").strip()


def write_template(name: str, directory: Path | str = ".", *, force: bool = False) -> list[Path]:
    """Writes a template, and what it needs, into `directory`; returns the paths written.

    Args:
        force: overwrite what is there.

    Raises:
        SpecError: there is no such template, a file is there already, or it cannot be written; nothing is written.
    """
    templates = dict(list_templates())
    if name not in templates:
        near = closest(name, templates)
        nearest = f" Closest: '{near[0]}'." if near else ""
        lines = "\n".join(f"  {each:<14} {line}" for each, line in templates.items())
        raise SpecError(f"'{name}' is not a template.{nearest} There are:\n{lines}", where="raypeft init")
    target = Path(directory)
    wanted = [(_FOLDER / f"{name}.yaml", target / f"{name}.yaml")]
    wanted += [(asset_folder() / each, target / "assets" / each) for each in ASSETS.get(name, ())]
    _check(wanted, force)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for source, place in reversed(wanted):  # the job last: where it is, all that it needs is
            _copy(source, place)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}.", where=str(target)) from error
    return [place for _, place in wanted]


def asset_folder() -> Path:
    """Where the quickstart's base and data are: in the installed package, or in the clone."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_CLONE


def _check(wanted: list[tuple[Path, Path]], force: bool) -> None:
    for source, place in wanted:
        if not source.exists():
            raise SpecError(
                f"{source.name} is missing from this installation.", where=str(source), hint="Install again."
            )
        if place.exists() and not force and not (place.is_dir() and _is_same(source, place)):
            raise SpecError(
                "is there already.", where=str(place), hint="Write elsewhere with --dir, or add --force."
            )


def _is_same(source: Path, place: Path) -> bool:
    """A base that was brought before, with nothing changed in it, is no reason to refuse."""
    names = {path.name: path.stat().st_size for path in source.iterdir()}
    return all(
        (place / name).is_file() and (place / name).stat().st_size == size for name, size in names.items()
    )


def _copy(source: Path, place: Path) -> None:
    """Written aside, then renamed: what is at `place` is whole, or not there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.part")
    if source.is_dir():
        shutil.copytree(source, aside, dirs_exist_ok=True)
        if place.exists():
            shutil.rmtree(place)
    else:
        shutil.copyfile(source, aside)
    aside.replace(place)
