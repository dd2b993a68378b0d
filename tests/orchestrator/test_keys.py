"""Tenants and keys as they are stored."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import RegistryError, StorageError
from orchestrator.keys import OURS, KeyBook, Limits
from orchestrator.spending import Spending, next_period


def book(tmp_path) -> KeyBook:
    return KeyBook(str(tmp_path))


def test_a_key_is_found_by_its_secret_and_by_nothing_else(tmp_path):
    keys = book(tmp_path)
    assert keys.read().is_empty
    made = keys.create("acme", {"requests_per_minute": 60})
    ring = keys.read()
    key = ring.find(made.secret)
    assert (key.id, key.tenant, key.state(time.time())) == (made.id, "acme", "active")
    for wrong in ("", made.id, made.secret[:-1], made.secret + "a", made.secret.upper(), "\ud800"):
        assert ring.find(wrong) is None
    assert ring.limits("acme") == Limits(requests_per_minute=60)


def test_nothing_that_is_stored_or_shown_holds_the_secret(tmp_path):
    keys = book(tmp_path)
    made = keys.create("acme")
    text = "".join(path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert text and made.secret not in text and made.secret.removeprefix("rp-") not in text
    assert made.secret not in repr(made) + repr(keys.rows()) + str([row.to_dict() for row in keys.rows()])


def test_limits_are_the_tenants_and_a_new_key_changes_only_what_it_names(tmp_path):
    keys = book(tmp_path)
    keys.create("acme", {"requests_per_minute": 60, "models": ("docs",)})
    second = keys.create("acme", {"tokens_per_minute": 1000})
    expected = Limits(requests_per_minute=60, tokens_per_minute=1000, models=("docs",))
    assert second.limits == expected == keys.read().limits("acme")
    assert [row.limits for row in keys.rows()] == [expected, expected]


def test_revoking_ends_a_key_or_a_tenant_and_nobody_else(tmp_path):
    keys = book(tmp_path)
    first, second, other = keys.create("acme"), keys.create("acme"), keys.create("zeta")
    assert keys.revoke(first.id) == [first.id]
    states = {row.id: row.state for row in keys.rows()}
    assert states == {first.id: "revoked", second.id: "active", other.id: "active"}
    assert set(keys.revoke("acme")) == {first.id, second.id}
    assert keys.read().find(other.secret).state(time.time()) == "active"
    with pytest.raises(RegistryError, match=r"no key or tenant 'zetta'. Closest: 'zeta'."):
        keys.revoke("zetta")


def test_keys_expire(tmp_path):
    made = book(tmp_path).create("acme", expires_s=10)
    ring = book(tmp_path).read()
    key = ring.find(made.secret)
    assert key.state(key.created + 9) == "active" and key.state(key.created + 10) == "expired"
    assert ring.has_active(key.created) and not ring.has_active(key.created + 11)


@pytest.mark.parametrize("name", ["", "a b", "-x", "a/b", "../x", "x" * 64, OURS])
def test_names_that_cannot_be_a_tenants(tmp_path, name):
    with pytest.raises(RegistryError, match="cannot be a tenant's name"):
        book(tmp_path).create(name)
    assert book(tmp_path).read().is_empty


def test_our_own_keys_are_short_lived_and_not_listed(tmp_path):
    keys = book(tmp_path)
    keys.create("acme")
    lent = keys.lend(seconds=-1)
    assert keys.read().find(lent).tenant == OURS and len(keys.rows()) == 1
    other = keys.lend(60)
    assert keys.read().find(other).state(time.time()) == "active"
    assert keys.read().find(lent) is None  # one that has ended is swept away


def test_keys_made_at_once_are_all_there(tmp_path):
    threads = [threading.Thread(target=lambda: book(tmp_path).create("acme")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(book(tmp_path).rows()) == 8


def test_spending_adds_up_over_processes_days_and_months(tmp_path):
    book(tmp_path).create("acme")
    spending = Spending(str(tmp_path))
    day, month = 86400, 31 * 86400
    at = 1_700_000_000  # 2023-11-14
    spending.add("acme", 5, 1, at)
    Spending(str(tmp_path)).add("acme", 7, 2, at + day)
    used = spending.add("acme", 100, 1, at + month)
    assert (used.tokens_in("total", at), used.tokens_in("month", at), used.tokens_in("day", at)) == (
        112,
        12,
        5,
    )
    assert (used.tokens_in("day", at + day), used.tokens_in("month", at + month)) == (7, 100)
    assert used.requests["total"] == 4 and spending.read("nobody").tokens == {}


def test_old_days_fall_out_and_the_sum_stays(tmp_path):
    book(tmp_path).create("acme")
    spending = Spending(str(tmp_path))
    for number in range(40):
        used = spending.add("acme", 1, 1, 1_700_000_000 + number * 86400)
    assert len([name for name in used.tokens if len(name) == 10]) == 31 and used.tokens["total"] == 40


def test_a_storage_without_keys_has_no_books(tmp_path):
    root = tmp_path / "mount"
    book(root).create("acme")
    spending = Spending(str(root))
    spending.add("acme", 5, 1)
    (root / "spending" / "acme.json").unlink()
    assert spending.read("acme").tokens == {}  # by hand: the budget begins anew
    spending.add("acme", 7, 1)
    root.rename(tmp_path / "away")
    root.mkdir()  # as where a folder is mounted no more
    for use in (lambda: spending.read("acme"), lambda: spending.add("acme", 1, 1)):
        with pytest.raises(StorageError, match="see that it is"):
            use()
    assert not any(root.iterdir())


def test_when_a_budget_begins_anew():
    at = 1_703_980_800 + 3600  # 2023-12-31 01:00 UTC
    assert next_period("day", at) == 1_703_980_800 + 86400 == next_period("month", at)
    assert next_period("total", at) is None
