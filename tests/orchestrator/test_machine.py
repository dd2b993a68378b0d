"""How much memory there is: of the machine, or of a container, by either version of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import machine

GB = 10**9


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GB with 40 GB to be had, and no container."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {40 * GB // 1024} kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "new")
    monkeypatch.setattr(machine, "OLD_GROUP", tmp_path / "old")
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GB // 4096}.get)
    return tmp_path


def limited(folder: Path, limit: int | str, held: int, version: int) -> None:
    folder.mkdir()
    names, total = (
        (("memory.max", "memory.current"), "")
        if version == 2
        else (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_",
        )
    )
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{held}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{total}inactive_file {GB}\n{total}active_file {2 * GB}\n")


def test_the_whole_machine(places):
    assert (machine.memory_bytes(), machine.free_bytes()) == (64 * GB, 40 * GB)


@pytest.mark.parametrize(("folder", "version"), [("new", 2), ("old", 1)])
def test_a_container_may_have_its_limit_less_what_it_holds_but_for_cached_files(places, folder, version):
    limited(places / folder, 16 * GB, 10 * GB, version)
    assert (machine.memory_bytes(), machine.free_bytes()) == (16 * GB, (16 - 10 + 3) * GB)


@pytest.mark.parametrize(("folder", "version", "limit"), [("new", 2, "max"), ("old", 1, 2**63 - 4096)])
def test_a_container_without_a_limit_is_the_machine(places, folder, version, limit):
    limited(places / folder, limit, 10 * GB, version)
    assert (machine.memory_bytes(), machine.free_bytes()) == (64 * GB, 40 * GB)


def test_a_full_container_has_nothing_left(places):
    limited(places / "new", GB, 9 * GB, 2)
    assert machine.free_bytes() == 0


def test_where_nothing_tells_a_gigabyte_counts_as_free(places):
    (places / "meminfo").unlink()
    assert machine.free_bytes() == 2**30


def test_of_this_machine():
    assert 0 < machine.free_bytes() <= machine.memory_bytes()
