"""Locks between processes, and file systems that have none."""

import errno
import fcntl
import os
import subprocess
import sys
import time

import pytest

from rotssl.base.lock import Held, locked


def test_a_lock_is_held_by_one_and_released_by_a_process_that_is_killed(tmp_path):
    path = tmp_path / "lock"
    code = "import sys, time, pathlib; from rotssl.base.lock import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(Held), locked(path):
            pass
        other.kill()
    with locked(path, patience=20):
        assert path.exists()
    with locked(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_without_flock_there_is_a_warning_and_no_lock(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass
    assert [record.getMessage().count("cannot be locked") for record in caplog.records] == [1, 1]
    assert "\n" not in caplog.text.strip().splitlines()[0]


def test_a_busy_lock_is_waited_for_no_longer_than_asked(tmp_path):
    with locked(tmp_path / "lock"):
        started = time.monotonic()
        with pytest.raises(Held), locked(tmp_path / "lock", patience=0.3):
            pass
        assert 0.3 <= time.monotonic() - started < 20


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError), locked(tmp_path / "file" / "lock"):
        pass
