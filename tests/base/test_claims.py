"""Locks in an object store: claims that are renewed and expire."""

import threading

import pytest

from rotssl.base import claims, objects
from rotssl.base.claims import claimed
from rotssl.base.errors import Held
from tests.memory_store import Memory


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Claims are renewed, and looked at, many times a second."""
    monkeypatch.setattr(claims, "EVERY_S", 0.02)
    monkeypatch.setattr(claims, "LOOK_S", 0.02)
    monkeypatch.setattr(claims, "WATCH_S", 1.0)


def test_a_lock_is_held_by_one_and_released(top, store):
    lock = top / "run" / ".lock"
    with claimed(lock):
        with pytest.raises(Held), claimed(lock):
            pass
        assert [entry.name.split("-")[0] for entry in lock.entries()] == ["held"]
    assert not store.keys
    with claimed(lock):
        pass


def test_of_two_that_come_at_once_one_gets_the_lock(top, monkeypatch):
    lock, both = top / ".lock", threading.Barrier(2)
    monkeypatch.setattr(claims.random, "uniform", lambda low, high, real=claims.random.uniform: real(0, 0.02))
    others, met, got = claims._others, set(), []

    def at_once(folder, own):
        found = others(folder, own)
        if threading.get_ident() not in met:  # both have looked before either takes the lock
            met.add(threading.get_ident())
            both.wait(10)
        return found

    monkeypatch.setattr(claims, "_others", at_once)
    leave = threading.Event()

    def ask():
        try:
            with claimed(lock):
                got.append("lock")
                leave.wait(10)
        except Held:
            got.append("held")
            leave.set()

    for _ in range(5):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        met.clear(), got.clear(), leave.clear(), both.reset()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == ["held", "lock"]


def test_the_claim_of_a_process_that_died_is_waited_for_until_it_expires(top, store, monkeypatch, caplog):
    lock = top / ".lock"
    monkeypatch.setattr(claims, "STALE_S", 0.5)
    monkeypatch.setattr(claims, "WATCH_S", 0.1)
    (lock / "held-dead").touch()
    died = (lock / "held-dead").changed()
    with claimed(lock):
        (held,) = lock.entries()
        assert held.name != "held-dead" and held.changed - died >= claims.STALE_S
    assert caplog.text.count("its process is silent; waiting until its claim expires") == 1


def test_a_claim_that_is_old_after_an_outage_and_renewed_is_alive(top, store, monkeypatch):
    lock = top / ".lock"
    (lock / "held-other").touch()
    store.ahead = claims.STALE_S + 1
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: (lock / "held-other").touch())
    with pytest.raises(Held), claimed(lock):
        pass


def test_a_claim_is_not_dead_because_the_store_was(top, store, monkeypatch):
    lock, slept = top / ".lock", []
    (lock / "held-other").touch()
    store.ahead = claims.STALE_S + 1
    monkeypatch.setattr(claims, "WATCH_S", 3.0)
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds
        slept.append(seconds)
        if len(slept) == 5:  # 3 s after the outage
            (lock / "held-other").touch()

    def others(folder, own, real=claims._others):
        found = real(folder, own)
        clock[0] += 100.0 if len(slept) == 2 else 0.0  # an outage until the end of the watch
        return found

    monkeypatch.setattr(claims.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(claims.time, "sleep", sleep)
    monkeypatch.setattr(claims, "_others", others)
    with pytest.raises(Held), claimed(lock):
        pass


def test_who_wrote_its_claim_anew_after_another_had_taken_it_is_ended(top, store, monkeypatch):
    lost, lock, write = threading.Event(), top / ".lock", Memory.write

    def late(self, name, content):
        if threading.current_thread().name == "claim" and not self.ahead:  # asleep between its look and this
            self.ahead = claims.STALE_S + claims.WATCH_S
            for entry in lock.entries():
                (lock / entry.name).remove()
            write(self, (lock / "held-other").below, b"")
        write(self, name, content)

    monkeypatch.setattr(Memory, "write", late)
    with claimed(lock, lost=lost.set):
        assert lost.wait(10)
        assert [entry.name for entry in lock.entries()] == ["held-other"]


def test_who_slept_between_its_look_and_its_claim_lets_go(top, store, monkeypatch):
    lock, first = top / ".lock", []

    def others(folder, own, real=claims._others):
        found = real(folder, own)
        if not first:  # asleep now, taken for dead, and another process has the lock
            first.append(own)
            own.remove()
        (folder / "held-other").touch()
        return found

    monkeypatch.setattr(claims, "_others", others)
    with pytest.raises(Held), claimed(lock):
        pass
    assert [entry.name for entry in lock.entries()] == ["held-other"]


def test_who_lost_the_lock_is_ended(top, monkeypatch):
    lost = threading.Event()
    with claimed(top / ".lock", lost=lost.set):
        (found,) = (top / ".lock").entries()
        first = (top / ".lock" / found.name).changed()
        while (top / ".lock" / found.name).changed() == first:  # it is renewed
            threading.Event().wait(0.02)
        (top / ".lock" / found.name).remove()
        assert lost.wait(10)


def test_a_lock_is_let_go_at_once_where_the_store_does_not_answer(top, store, quick):
    with claimed(top / ".lock"):
        store.down = "AWS Error NETWORK_CONNECTION: couldn't connect"
    assert quick[0] == 0


def test_a_lock_is_asked_for_again_where_the_store_does_not_answer(top, store, monkeypatch):
    (top / "x").write_bytes(b"")
    store.down = "AWS Error NETWORK_CONNECTION: couldn't connect"
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: setattr(store, "down", None))
    with claimed(top / ".lock"):
        assert len((top / ".lock").entries()) == 1
