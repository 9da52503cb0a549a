"""Paths of runs: what is done with a local one is done with one in an object store."""

import errno
import logging

import pytest

from rotssl.base import objects, paths
from rotssl.base.objects import ObjectPath
from rotssl.base.place import Objects


@pytest.fixture(params=["local", "objects"])
def folder(request, tmp_path, top):
    return tmp_path if request.param == "local" else top / "exp" / "run"


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
