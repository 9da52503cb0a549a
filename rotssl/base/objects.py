"""Paths in an object store, with the part of pathlib's interface that the files of runs need.

A store that does not answer is asked again for a while, so that an outage of minutes is none of the run's. What a store refuses
for good, such as a wrong key, is an error at once.
"""

import errno
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar
from urllib.parse import quote

from rotssl.base import heartbeat
from rotssl.base.errors import in_a_line
from rotssl.base.place import Entry, Objects

log = logging.getLogger(__name__)
PATIENCE_S = 300.0  # for which a store that has answered before is asked again; less than workers wait for each other
FIRST_S = 30.0  # as above, for one that never has: its address may be wrong
_REFUSED = (
    *("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE"),
    *("UNRECOGNIZED_CLIENT", "NoSuchBucket", "AccessDenied", "HTTP status 401", "HTTP status 403", "Unauthenticated"),
    *("AuthorizationFailure", "AuthenticationFailed", "No credentials"),
)
_PLAIN = "/~!$&'()*+,;=:@"  # in the path of an address, beside letters and digits
Answer = TypeVar("Answer")


class ObjectPath:
    """A file or a folder of an object store. A folder is there as long as something is in it.

    ``read`` and ``write`` of it raise FileNotFoundError as pathlib's do, and OSError with EIO if the store refuses, or does not
    answer for as long as it is asked.

    Args:
        store: the place that the name is looked for in.
        address: of the place, without options and slash at the end.
        options: of the address, with their question mark; or empty.
        name: below the place; empty: the place itself.
    """

    # Stores that have answered in this process, and since when others have been silent: one line tells of an outage.
    _answered: ClassVar[set[Objects]] = set()
    _silent: ClassVar[dict[Objects, float]] = {}

    def __init__(self, store: Objects, address: str, options: str = "", name: str = "") -> None:
        self.store, self._address, self._options, self._name = store, address, options, name
        self._part: tuple[ObjectPath, bytearray] | None = None

    def _at(self, name: str) -> "ObjectPath":
        return ObjectPath(self.store, self._address, self._options, name)

    def __str__(self) -> str:
        return f"{self._address}/{quote(self._name, safe=_PLAIN)}".rstrip("/") + self._options

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "ObjectPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "ObjectPath":
        return self._at(f"{self._name}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the name."""
        return (self._name or self._address).rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        """The folder that holds it; the place itself has no parent, and stands for it."""
        return self._at(self._name.rpartition("/")[0])

    def with_name(self, name: str) -> "ObjectPath":
        """A neighbour of it."""
        return self.parent / name

    @property
    def below(self) -> str:
        """The name below the place."""
        return self._name

    def absolute(self) -> "ObjectPath":
        """The path itself."""
        return self

    def _ask(self, ask: Callable[[], Answer], patience: float | None = None) -> Answer:
        """What the store answers, asked again if it does not.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the store refuses, or did not answer for so many seconds, those of earlier questions included.
        """
        if patience is None:
            patience = PATIENCE_S if self.store in self._answered else FIRST_S
        until, wait = self._silent.get(self.store, time.monotonic()) + patience, 0.5
        while True:
            try:
                found = ask()
                self._answered.add(self.store)
                if self._silent.pop(self.store, None) is not None:
                    log.warning("%s answers again: going on", self._address)
                return found
            except FileNotFoundError as error:
                if not str(error).startswith("Bucket "):
                    raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from error
                reason = in_a_line(error)
                raise OSError(errno.EIO, reason, str(self)) from error
            except OSError as error:
                reason = in_a_line(error)
                if any(word in str(error) for word in _REFUSED) or time.monotonic() + wait > until:
                    raise OSError(errno.EIO, reason, str(self)) from error
            if self.store not in self._silent:
                self._silent[self.store] = time.monotonic()
                log.warning("%s does not answer, trying again for %d s (%s)", self._address, patience, reason)
            heartbeat.beat()
            time.sleep(wait)
            wait = min(10.0, 2 * wait)

    def entry(self) -> Entry | None:
        """What is known of it; None if it is not there."""
        return self._ask(lambda: self.store.entry(self._name))

    def entries(self) -> list[Entry]:
        """What is known of all that this folder holds, by name."""
        return sorted(self._ask(lambda: list(self.store.entries(self._name))), key=lambda entry: entry.name)

    def exists(self) -> bool:
        """As pathlib's."""
        return self.entry() is not None

    def is_file(self) -> bool:
        """As pathlib's."""
        found = self.entry()
        return found is not None and found.is_file

    def is_dir(self) -> bool:
        """As pathlib's."""
        found = self.entry()
        return found is not None and not found.is_file

    def changed(self) -> float:
        """Seconds since 1970 of its last change, on the store's clock.

        Raises:
            FileNotFoundError: it is not there.
        """
        found = self.entry()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return found.changed

    def read_bytes(self) -> bytes:
        """As pathlib's."""
        return self._ask(lambda: self.store.read(self._name))

    def read_text(self) -> str:
        """As pathlib's, in UTF-8."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write it whole."""
        self._ask(lambda: self.store.write(self._name, content))

    def touch(self) -> None:
        """Make it an empty file that was changed now. A store that does not answer is not asked again."""
        self._ask(lambda: self.store.write(self._name, b""), patience=0.0)

    def unlink(self, missing_ok: bool = False) -> None:
        """As pathlib's."""
        if missing_ok or self.is_file():
            self._ask(lambda: self.store.remove(self._name))
        else:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))

    def remove(self) -> None:
        """Remove it with all that is in it, if it is there."""
        self._ask(lambda: self.store.remove(self._name))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there once something is in it."""

    def upload(self, file: Path) -> None:
        """Copy a file of this machine here."""
        self._ask(lambda: self.store.copy(self._name, file))

    def download(self, file: Path) -> None:
        """Copy it to a file of this machine."""
        self._ask(lambda: self.store.fetch(self._name, file))

    def append(self, content: bytes) -> None:
        """Add to a file that is kept in parts, one for each ObjectPath that adds to it, since no store appends."""
        if self._part is None:
            self._part = self / f"{len(self.entries()):06d}-{uuid.uuid4().hex[:8]}", bytearray()
        file, before = self._part
        whole = before + content
        file.write_bytes(bytes(whole))
        self._part = file, whole

    def parts(self) -> bytes:
        """The content of a file that is kept in parts, in the order in which they were begun; empty if there is none.

        A file of this name, copied here from a disk, comes first.
        """
        found = [self.read_bytes()] if self.is_file() else []
        found += [(self / entry.name).read_bytes() for entry in self.entries() if entry.is_file]
        return b"".join(part if part.endswith(b"\n") else part + b"\n" for part in found if part)
