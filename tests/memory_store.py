"""An object store in this process, which can be down."""

import time

from rotssl.base.place import Entry, Objects


class Memory(Objects):
    """A prefix of a store: key -> content and the time of its writing, on the store's clock.

    Attributes:
        down: what the store says to everything, until it is None again.
        ahead: seconds by which its clock is ahead.
        calls: number of requests so far.
    """

    def __init__(self, prefix, keys=None):
        super().__init__(None, prefix)
        self.keys = {} if keys is None else keys
        self.down, self.ahead, self.calls = None, 0.0, 0

    def _asked(self):
        self.calls += 1
        if self.down:
            raise OSError(self.down)

    def entry(self, name):
        self._asked()
        key = self._key(name)
        if key in self.keys:
            content, changed = self.keys[key]
            return Entry(key.rpartition("/")[2], True, len(content), changed)
        folder = any(other.startswith(f"{key}/") for other in self.keys)
        return Entry(key.rpartition("/")[2], False, 0, 0.0) if folder else None

    def entries(self, name):
        self._asked()
        top = f"{self._key(name)}/"
        names = {key.removeprefix(top).partition("/")[0] for key in self.keys if key.startswith(top)}
        return [self.entry(f"{name}/{found}".lstrip("/")) for found in names]

    def read(self, name):
        self._asked()
        if self._key(name) not in self.keys:
            raise FileNotFoundError(f"Path does not exist '{self._key(name)}'")
        return self.keys[self._key(name)][0]

    def write(self, name, content):
        self._asked()
        self.keys[self._key(name)] = bytes(content), time.time() + self.ahead

    def copy(self, name, file):
        self.write(name, file.read_bytes())

    def fetch(self, name, file):
        file.write_bytes(self.read(name))

    def remove(self, name):
        self._asked()
        key = self._key(name)
        for found in [found for found in self.keys if found == key or found.startswith(f"{key}/")]:
            del self.keys[found]
