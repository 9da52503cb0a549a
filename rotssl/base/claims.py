"""Locks in an object store: claims that are renewed as long as their process lives, and expire without it.

A list must show what was written before, as those of S3, Google Cloud Storage and Azure do. Whoever wants the lock first writes
that it is a candidate, and then lists: of two candidates the later one sees the other or its lock. Times are compared on the
store's own clock.
"""

import contextlib
import itertools
import logging
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from rotssl.base.errors import Held
from rotssl.base.objects import ObjectPath
from rotssl.base.place import Entry

log = logging.getLogger(__name__)
EVERY_S = 10.0  # between renewals
STALE_S = 60.0  # a claim as old as this has missed five
# For which claims are watched: that of a living process is renewed, also after an outage, when all are old.
WATCH_S = 15.0
LOOK_S = 1.0  # between looks
_SLOW_S = 2.0  # a look that takes longer had to wait for the store
_TRIES = 10  # of candidates that meet others
_HELD, _CANDIDATE, _SILENT = "held-", "candidate-", "silent"


def _end_process() -> None:
    os._exit(1)  # whatever this process still wrote would be into the files of the one that took over


@contextlib.contextmanager
def claimed(folder: ObjectPath, patience: float = 0, lost: Callable[[], None] = _end_process) -> Iterator[None]:
    """Hold the lock that is kept in a folder.

    One that a living process holds is known by its next renewal, after ten seconds; one of a dead process is waited for until it
    has expired, whatever the patience.

    Args:
        folder: for the claims only.
        patience: seconds to wait for another process.
        lost: called in another thread if another process has taken the lock, because this one was silent for so long.

    Raises:
        Held: another process still holds it.
        OSError: the store refuses.
    """
    own = folder / f"{_HELD}{uuid.uuid4().hex}"
    until, told = time.monotonic() + patience, False
    for tries in itertools.count(1):
        found = _take(folder, own)
        if found == "":
            break
        if found == _SILENT:
            if not told:
                log.warning("%s: its process is silent; waiting until its claim expires", folder.parent)
            told = True
            continue
        if time.monotonic() >= until and (found == _HELD or tries >= _TRIES):
            raise Held(str(folder))
        time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - so that candidates do not meet again
    ending = threading.Event()
    thread = threading.Thread(target=_renew, args=(folder, own, ending, lost), name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
        with contextlib.suppress(OSError):  # it expires; a store that does not answer is not waited for
            own.store.remove(own.below)


def _take(folder: ObjectPath, own: ObjectPath) -> str:
    """Try to take the lock; returns an empty string, or what is in the way: the kind of another process' claim."""
    candidate = folder / own.name.replace(_HELD, _CANDIDATE)
    candidate.write_bytes(b"")  # unlike a renewal it waits for a store that does not answer
    try:
        others = _others(folder, candidate)
        fresh = [entry for entry, silent in others if silent < STALE_S]
        if fresh and not any(entry.name.startswith(_HELD) for entry in fresh):
            return _CANDIDATE
        if alive := _revived(folder, candidate, [entry for entry, _ in others]):
            return _HELD if any(entry.name.startswith(_HELD) for entry in alive) else _CANDIDATE
        if fresh:
            return _SILENT
        for entry, _ in others:
            (folder / entry.name).remove()
        own.write_bytes(b"")
        # Whoever was suspended after its look was taken for dead: of two claims each of them sees the other's.
        if any(entry.name.startswith(_HELD) and entry.name != own.name for entry in folder.entries()):
            own.remove()
            return _CANDIDATE
        return ""
    finally:
        candidate.remove()


def _others(folder: ObjectPath, own: ObjectPath) -> list[tuple[Entry, float]]:
    """All other claims, and the seconds since each was renewed, as seen from a claim that was just made."""
    entries = folder.entries()
    now = max((entry.changed for entry in entries if entry.name == own.name), default=0.0)
    return [(entry, now - entry.changed) for entry in entries if entry.name != own.name]


def _revived(folder: ObjectPath, candidate: ObjectPath, claims: list[Entry]) -> list[Entry]:
    """Watch claims for a while, if there are any; returns those that were renewed, and new ones."""
    known, until = {entry.name: entry.changed for entry in claims}, time.monotonic() + WATCH_S
    while claims and time.monotonic() < until:
        time.sleep(LOOK_S)
        begun = time.monotonic()
        seen = [entry for entry, _ in _others(folder, candidate) if known.get(entry.name) != entry.changed]
        if seen:
            return seen
        if time.monotonic() - begun > _SLOW_S:  # an outage: nobody could renew anything either
            until = time.monotonic() + WATCH_S
    return []


def _renew(folder: ObjectPath, own: ObjectPath, ending: threading.Event, lost: Callable[[], None]) -> None:
    last = math.inf
    while not ending.wait(EVERY_S):
        try:
            found = own.store.entry(own.below)
            if found is None or (found.changed - last >= STALE_S and _outlived(own)):
                log.critical("%s: another process has taken over, since this one was silent: ending", folder.parent)
                lost()
                return
            last = found.changed
            own.touch()
        except OSError as error:
            log.debug("%s cannot be renewed (%s)", own, error)  # the store's outage; who writes says so


def _outlived(own: ObjectPath) -> bool:
    """Whether another process has a claim, too, after a renewal so late that it may have written a removed one anew."""
    names = [entry.name for entry in own.store.entries(own.parent.below)]
    if not any(name.startswith(_HELD) and name != own.name for name in names):
        return False
    own.store.remove(own.below)
    return True
