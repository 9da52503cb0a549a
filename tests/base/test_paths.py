"""Paths of runs: what is done with a local one is done with one in an object store."""

import errno
import logging
import threading

import pytest

from rotssl.base import claims, objects, paths
from rotssl.base.claims import claimed
from rotssl.base.errors import Held
from rotssl.base.objects import ObjectPath
from rotssl.base.place import Objects
from tests.memory_store import Memory


@pytest.fixture
def store():
    return Memory("bucket/prefix")


@pytest.fixture
def top(store):
    return ObjectPath(store, "s3://bucket/prefix", "?endpoint_override=host:1")


@pytest.fixture(params=["local", "objects"])
def folder(request, tmp_path, top):
    return tmp_path if request.param == "local" else top / "exp" / "run"


@pytest.fixture
def quick(monkeypatch):
    """Seconds pass by counting those that are slept."""
    clock = [0.0]
    monkeypatch.setattr(objects.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock


def test_a_path_names_its_neighbours_and_keeps_the_options_of_its_address(top):
    run = top / "exp/run"
    assert str(run) == "s3://bucket/prefix/exp/run?endpoint_override=host:1"
    assert (run.name, run.parent.name, run.parent.parent, top.name) == ("run", "exp", top, "prefix")
    assert run == top / "exp" / "run" and hash(run) == hash(top / "exp" / "run") and run != run.parent
    assert run.with_name("x") == top / "exp" / "x"
    assert run.absolute() is run


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "ä", "#?&+"])
def test_the_address_of_any_name_leads_to_it_again(name):
    run = paths.at("s3://bucket/prefix?endpoint_override=host:1&scheme=http") / "exp" / name
    again = paths.at(str(run))
    assert again == run and run.name == name
    assert f"{again.store.prefix}/{again.below}".rstrip("/") == f"bucket/prefix/exp/{name}"


@pytest.mark.parametrize("where", ["bucket//x", "bucket/a/../x", "bucket/./x", "/x"])
def test_an_address_that_names_nothing_is_refused(where):
    with pytest.raises(ValueError, match=f"^s3://{where}"):
        paths.at(f"s3://{where}?endpoint_override=host:1&scheme=http")


def test_an_address_is_a_local_path_or_one_in_a_store(monkeypatch, tmp_path, store):
    monkeypatch.setattr(paths, "place", lambda address: store)
    assert paths.at(str(tmp_path)) == tmp_path
    assert str(paths.at("s3://bucket/prefix/?scheme=http")) == "s3://bucket/prefix?scheme=http"
    assert isinstance(paths.at("s3://bucket/prefix"), ObjectPath)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no login"):
        paths.at("s3://key:secret@bucket/prefix")


def test_files_are_written_whole_read_and_removed(folder):
    file = folder / "run.json"
    assert not file.exists() and paths.stamp(file) is None and paths.folders(folder / "none") == []
    with pytest.raises(FileNotFoundError):
        file.read_text()
    with pytest.raises(FileNotFoundError):
        paths.changed(file)
    paths.write_whole(file, "one")
    paths.write_whole(file, b"two")
    assert (file.read_text(), file.is_file(), file.is_dir(), folder.is_dir()) == ("two", True, False, True)
    assert paths.changed(file) > 1e9
    (folder / "sub").mkdir(exist_ok=True)
    paths.write_whole(folder / "sub" / "x", "")
    assert paths.folders(folder) == [folder / "sub"]
    paths.remove_tree(folder / "sub")
    paths.remove_tree(folder / "sub")
    assert paths.folders(folder) == [] and file.exists()
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()


def test_lines_are_kept_in_the_order_of_starts(folder):
    file, again = folder / "lines", folder / "lines"
    assert paths.read_lines(file) == []
    paths.append_line(file, b"1")
    first = paths.stamp(file)
    paths.append_line(file, b"2")
    assert paths.stamp(file) != first
    paths.append_line(again, b"3")  # another start
    assert paths.read_lines(file) == [b"1", b"2", b"3"]


def test_a_process_that_is_not_the_writer_any_more_loses_no_line_of_the_other(top):
    old, new = top / "lines", top / "lines"
    old.append(b"1\n")
    new.append(b"2\n")
    old.append(b"late\n")
    assert new.parts() == b"1\nlate\n2\n"


def test_lines_that_were_copied_between_disk_and_store_are_read_and_added_to(top, tmp_path):
    paths.append_line(tmp_path / "lines", b"1")
    (top / "lines").write_bytes((tmp_path / "lines").read_bytes())
    paths.append_line(top / "lines", b"2")
    paths.append_line(top / "lines", b"3")
    assert paths.read_lines(top / "lines") == [b"1", b"2", b"3"]
    (tmp_path / "back" / "lines").mkdir(parents=True)
    for entry in (top / "lines").entries():
        (tmp_path / "back" / "lines" / entry.name).write_bytes((top / "lines" / entry.name).read_bytes())
    paths.append_line(tmp_path / "back" / "lines", b"4")
    assert paths.read_lines(tmp_path / "back" / "lines") == [b"2", b"3", b"4"]


def test_lines_of_a_file_that_was_copied_from_a_disk_come_first(top):
    file = top / "lines"
    file.write_bytes(b"1\n2 cut sh")
    assert paths.read_lines(file) == [b"1", b"2 cut sh"]
    paths.append_line(file, b"3")
    assert paths.read_lines(top / "lines") == [b"1", b"2 cut sh", b"3"]


def test_files_are_brought_to_this_machine_and_back(folder, tmp_path_factory):
    with paths.filled(folder / "report") as here:
        (here / "page.html").write_text("<p>")
    with paths.fetched(folder / "report" / "page.html") as local:
        assert (local.name, local.read_text()) == ("page.html", "<p>")
    assert local.exists() == (local.parent == folder / "report")


def test_a_store_that_is_down_is_asked_again_and_says_so_once(store, top, quick, monkeypatch, caplog):
    (top / "x").write_bytes(b"1")
    store.down = "AWS Error NETWORK_CONNECTION: couldn't connect"
    sleep = objects.time.sleep

    def wake(seconds):
        sleep(seconds)
        store.down = None if quick[0] > 100 else store.down

    monkeypatch.setattr(objects.time, "sleep", wake)
    assert (top / "x").read_bytes() == b"1" and quick[0] > 100
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[0].startswith("s3://bucket/prefix does not answer, trying again for 300 s (AWS Error NETWORK")
    assert lines[1:] == ["s3://bucket/prefix answers again: going on"]


@pytest.mark.parametrize("before", [True, False], ids=["answered before", "never answered"])
def test_a_store_that_stays_down_is_an_error_of_the_disk(store, top, quick, before):
    if before:
        (top / "x").write_bytes(b"1")
    store.down = "AWS Error NETWORK_CONNECTION: couldn't connect"
    with pytest.raises(OSError, match="couldn't connect") as caught:
        (top / "x").write_bytes(b"2")
    assert caught.value.errno == errno.EIO and caught.value.filename == str(top / "x")
    patience = objects.PATIENCE_S if before else objects.FIRST_S
    assert patience - 10 <= quick[0] <= patience
    ended = quick[0]
    with pytest.raises(OSError, match="couldn't connect"):
        (top / "y").read_bytes()
    assert quick[0] - ended <= 10  # whoever says so in the end does not wait as long again
    store.down = None
    (top / "x").write_bytes(b"2")


def test_what_a_store_refuses_is_not_asked_again(store, top, quick):
    store.down = "AWS Error ACCESS_DENIED during PutObject operation"
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        (top / "x").write_bytes(b"1")
    assert quick[0] == 0


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


def test_pyarrow_s_answers_are_read(tmp_path):
    from pyarrow import fs

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(b"abc")
    store = Objects(fs.LocalFileSystem(), str(tmp_path))
    assert store.entry("none") is None and list(store.entries("none")) == []
    file, folder = store.entry("in/x"), store.entry("in")
    assert (file.name, file.is_file, file.bytes, file.changed) == (
        *("x", True, 3),
        pytest.approx((tmp_path / "in" / "x").stat().st_mtime),
    )
    assert (folder.is_file, [entry.name for entry in store.entries("in")]) == (False, ["x"])


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
