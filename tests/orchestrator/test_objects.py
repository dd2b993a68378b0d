"""The two writes that keep processes apart, on a disk and on S3, and what a failed one leaves: nothing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import objects
from orchestrator.errors import StorageError
from orchestrator.objects import NotFound, local

from .s3 import run_together


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_create_writes_once(place: str) -> None:
    url = objects.join(place, "a", "x.json")
    assert objects.create_if_absent(url, b"one") is True
    assert objects.create_if_absent(url, b"two") is False
    assert objects.read(url)[0] == b"one"


def test_replace_needs_the_etag_of_what_is_there(place: str) -> None:
    url = objects.join(place, "x")
    first = objects.replace_if(url, None, b"one")
    assert first is not None
    assert objects.replace_if(url, None, b"again") is None
    assert objects.read(url) == (b"one", first)
    second = objects.replace_if(url, first, b"two")
    assert second is not None
    assert objects.replace_if(url, first, b"three") is None
    assert objects.read(url) == (b"two", second)
    assert objects.replace_if(objects.join(place, "absent"), first, b"") is None


def test_list_exists_delete(place: str) -> None:
    assert objects.list_(place) == [] and not objects.exists(place)
    for name in ("b/1", "a", ".hidden"):
        objects.write(objects.join(place, name), b"")
    assert objects.list_(place) == ["a", "b"]
    assert objects.exists(objects.join(place, "b")) and objects.exists(objects.join(place, "a"))
    objects.delete(objects.join(place, "a"))
    objects.delete(objects.join(place, "a"))
    assert objects.list_(place) == ["b"]


def test_write_replaces_whatever_is_there(place: str) -> None:
    url = objects.join(place, "x")
    objects.write(url, b"1")
    objects.write(url, b"22")
    assert objects.read(url)[0] == b"22"


def test_a_missing_file_is_not_found(place: str) -> None:
    url = objects.join(place, "nothing")
    with pytest.raises(NotFound) as caught:
        objects.read(url)
    assert str(caught.value) == f"{url}: there is no such file."


def test_trees_go_and_come_back(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "x").write_bytes(b"x" * 100_000)
    (source / "manifest.json").write_bytes(b"{}")
    url = objects.join(place, "tree")
    objects.put_tree(source, url, manifest="manifest.json")
    back = objects.get_tree(url, tmp_path / "back" / "deep")
    assert everything(back) == ["inner", "inner/x", "manifest.json"]
    assert (back / "inner" / "x").read_bytes() == b"x" * 100_000
    with pytest.raises(StorageError, match=r"tree: something is there already\. Nothing was written\."):
        objects.put_tree(source, url, manifest="manifest.json")
    with pytest.raises(StorageError, match=r"something is there already\. Name a new or empty folder\."):
        objects.get_tree(url, back)
    objects.delete_tree(url)
    assert objects.list_(place) == []
    with pytest.raises(NotFound):
        objects.get_tree(url, tmp_path / "other" / "deep")
    assert not (tmp_path / "other").exists()


def test_check_writable_leaves_nothing(place: str, tmp_path: Path) -> None:
    objects.check_writable(place)
    assert not objects.exists(place) and objects.list_(place) == []
    assert everything(tmp_path) == []


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    same = {
        objects.normal_url(url)
        for url in ("runs", "./runs/", "~/runs", f"file://{tmp_path}/runs", tmp_path / "runs")
    }
    assert same == {str(tmp_path / "runs")}
    assert objects.normal_url("s3a://b/x/") == "s3://b/x"


def test_a_thousand_lost_updates_would_show(place: str) -> None:
    """Eight threads count together: each increment must survive."""
    url = objects.join(place, "count")
    objects.create_if_absent(url, b"0")
    rounds = 25 if objects.is_local(place) else 5

    def count() -> None:
        for _ in range(rounds):
            while True:
                data, etag = objects.read(url)
                if objects.replace_if(url, etag, str(int(data) + 1).encode()):
                    break

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert objects.read(url)[0] == str(8 * rounds).encode()


CREATE = """
import sys
from orchestrator.objects import create_if_absent, join
who, place = sys.argv[1:]
for i in range(100):
    if create_if_absent(join(place, "race", i), (who * 1000).encode()):
        print(i)
"""


def test_two_processes_never_both_create(place: str) -> None:
    won = [set(out.split()) for out in run_together(CREATE, ["a", place], ["b", place])]
    assert won[0] | won[1] == {str(i) for i in range(100)} and not won[0] & won[1]
    for who, mine in zip("ab", won, strict=True):
        for i in mine:
            assert objects.read(objects.join(place, "race", i))[0] == (who * 1000).encode()


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EROFS, "the file system is read-only. Mount it writable, or name another folder."),
        (errno.ENOSPC, "the disk is full. Free some space, or name a folder on another disk."),
        (errno.EDQUOT, "the disk quota is used up. Free some space, or name a folder on another disk."),
        (errno.EACCES, "no permission. Change the folder's owner or mode, or name another folder."),
    ],
)
@pytest.mark.parametrize("broken", ["fsync", "link", "replace", "rename", "mkdir"])
def test_a_refused_write_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, number: int, sentence: str
) -> None:
    (tmp_path / "here").write_bytes(b"old")
    source = tmp_path / "source"
    source.mkdir()
    (source / "x").write_bytes(b"x")
    etag = objects.read(tmp_path / "here")[1]
    before = everything(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    new, here, tree = tmp_path / "deep" / "new", tmp_path / "here", tmp_path / "deep" / "tree"
    writes: dict[str, list[Callable[[], object]]] = {
        "fsync": [
            lambda: objects.create_if_absent(new, b"1"),
            lambda: objects.replace_if(here, etag, b"2"),
            lambda: objects.put_tree(source, tree),
            lambda: objects.check_writable(tree),
        ],
        "link": [lambda: objects.create_if_absent(new, b"1")],
        "replace": [lambda: objects.replace_if(here, etag, b"2"), lambda: objects.write(here, b"2")],
        "rename": [lambda: objects.put_tree(source, tree), lambda: objects.get_tree(source, tree)],
        "mkdir": [lambda: objects.create_if_absent(new, b"1")],
    }
    monkeypatch.setattr(os, broken, refuse)
    for write in writes[broken]:
        with pytest.raises(StorageError) as caught:
            write()
        assert sentence in str(caught.value) and str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    assert everything(tmp_path) == before
    assert (tmp_path / "here").read_bytes() == b"old"


def test_without_hard_links_creating_is_exclusive_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    won = []
    threads = [
        threading.Thread(target=lambda who=who: won.append(objects.create_if_absent(tmp_path / "x", who)))
        for who in (b"a", b"b", b"c", b"d")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    assert everything(tmp_path) == ["x"]


def test_a_link_whose_answer_got_lost_still_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def repeated(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert objects.create_if_absent(tmp_path / "x", b"mine") is True
    assert objects.create_if_absent(tmp_path / "x", b"other") is False
    assert objects.read(tmp_path / "x")[0] == b"mine"


def test_another_hosts_unfinished_write_is_left_for_a_day(tmp_path: Path) -> None:
    theirs = tmp_path / ".x.0123abcd-1-1-89abcdef.tmp"
    theirs.write_bytes(b"")
    objects.clean(tmp_path)
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    objects.clean(tmp_path)
    assert not theirs.exists()


KILLED = """
import os, sys
os.link = lambda *a: os.kill(os.getpid(), 9)
from orchestrator.objects import create_if_absent
create_if_absent(sys.argv[1], b"never")
"""


def test_what_a_killed_writer_leaves_is_not_seen_and_is_cleaned(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):  # the child was killed
        run_together(KILLED, [str(tmp_path / "x")])
    (left,) = everything(tmp_path)
    assert left.startswith(".x.") and left.endswith(".tmp")
    assert objects.list_(tmp_path) == [] and not objects.exists(tmp_path / "x")
    mine = local._aside_name(tmp_path / "y")
    mine.write_bytes(b"still being written")
    objects.clean(tmp_path)
    assert everything(tmp_path) == [mine.name]


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"a part of this path is a file, not a folder\. Name another folder\."
    ):
        objects.create_if_absent(tmp_path / "file" / "x", b"")


def test_a_missing_bucket_says_so(s3_bucket) -> None:
    url = "s3://no-such-bucket-here/x"
    for act in (
        lambda: objects.create_if_absent(url, b""),
        lambda: objects.check_writable(url),
        lambda: objects.list_(url),
        lambda: objects.read(url),
    ):
        with pytest.raises(StorageError) as caught:
            act()
        assert "the bucket 'no-such-bucket-here' does not exist. Create it, or name another one." in str(
            caught.value
        )


def test_a_store_that_does_not_answer_says_so(s3_bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        StorageError, match=r"the store does not answer\. Check AWS_ENDPOINT_URL and the network\."
    ):
        objects.read(s3_bucket.url + "/x")


def test_denied_access_says_so(s3_bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(method: str, **request: object) -> None:
        error = PermissionError("Access Denied")
        error.response = {"Error": {"Code": "AccessDenied"}}  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(
        "orchestrator.objects.s3._store", lambda: type("Store", (), {"call_s3": staticmethod(deny)})()
    )
    with pytest.raises(StorageError) as caught:
        objects.create_if_absent(s3_bucket.url + "/x", b"")
    assert str(caught.value) == (
        f"{s3_bucket.url}/x: the store denies access to the bucket '{s3_bucket.name}'. "
        "Give these credentials the right to read, write, list and delete there, or use others."
    )


def test_a_repeated_request_knows_its_own_first_copy(s3_bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a write gets lost, the client repeats it and meets If-None-Match: it still won."""
    from orchestrator.objects import s3

    store = s3._store()
    real = store.call_s3

    def answer_lost(method: str, **request: object) -> object:
        if method == "put_object" and "IfNoneMatch" in request:
            real(method, **request)
        return real(method, **request)

    monkeypatch.setattr(store, "call_s3", answer_lost)
    assert objects.create_if_absent(s3_bucket.url + "/x", b"mine") is True
    monkeypatch.undo()


def test_a_failed_upload_of_a_tree_leaves_no_object(
    s3_bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.objects import s3

    for name in ("a", "b", "manifest.json"):
        (tmp_path / name).write_bytes(b"1")
    store = s3._store()
    real = store.put_file

    def fail_second(local: str, remote: str) -> None:
        if remote.endswith("/b"):
            raise ConnectionError("reset")
        real(local, remote)

    monkeypatch.setattr(store, "put_file", fail_second)
    with pytest.raises(StorageError, match="the store does not answer"):
        objects.put_tree(tmp_path, s3_bucket.url + "/tree", manifest="manifest.json")
    assert s3_bucket.keys() == []


def test_other_file_systems_are_read_but_not_written(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/place/tree/x", b"1")
    assert objects.read("memory://place/tree/x")[0] == b"1"
    assert objects.list_("memory://place/tree") == ["x"] and objects.exists("memory://place/tree/x")
    assert (objects.get_tree("memory://place/tree", tmp_path / "tree") / "x").read_bytes() == b"1"
    for act in (
        lambda: objects.create_if_absent("memory://place/y", b""),
        lambda: objects.replace_if("memory://place/y", None, b""),
        lambda: objects.check_writable("memory://place"),
        lambda: objects.put_tree(tmp_path / "tree", "memory://place/other"),
    ):
        with pytest.raises(StorageError) as caught:
            act()
        assert str(caught.value).endswith(
            ": memory:// has no write here that fails if another process was first, so runs and registries "
            "cannot live there. Use a folder that all nodes see, or s3://BUCKET/FOLDER."
        )
    memory.rm("/place", recursive=True)


def test_looking_at_local_files_needs_no_s3_client() -> None:
    (out,) = run_together(
        "import sys, orchestrator.objects as o, orchestrator.store, orchestrator.registry; o.list_('.');"
        "print(sorted({'s3fs', 'botocore', 'torch', 'ray', 'transformers'} & set(sys.modules)))",
        [],
    )
    assert out.strip() == "[]"
