"""A registry that other packages add to: by an entry point, which every process finds, or by a call, in one process."""

import logging
from collections import UserDict, defaultdict
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from rotssl.config.fields import ConfigError

log = logging.getLogger(__name__)
Spec = TypeVar("Spec")


class Registry(UserDict[str, Spec], Generic[Spec]):
    """Name -> entry. The entry points of other packages are looked for when a name is not known, and when all are listed.

    A name whose entry point cannot be used is not listed. It is in the registry nevertheless: whoever asks for it gets a
    ConfigError with the reason. An entry point with the name of one of the project's own is left out, with a warning.

    Args:
        group: group of the entry points.
        own: the project's own entries.
        refuse: returns why an entry with a name cannot be used; empty if it can.
        unlisted: own entries for those who ask for them by name; whoever goes through all entries does not meet them.

    Attributes:
        sources: name -> where an entry that is not the project's own comes from, for records and messages.
        added: names that were registered by a call in this process.
    """

    def __init__(
        self, group: str, own: dict[str, Spec], refuse: Callable[[str, object], str], unlisted: Collection[str] = ()
    ) -> None:
        super().__init__(own)
        self.own, self.unlisted = frozenset(own), frozenset(unlisted)
        self.group, self.refuse = group, refuse
        self.sources, self.added = dict[str, str](), set[str]()
        self._broken: dict[str, str] | None = None  # None: nobody has looked yet

    @property
    def broken(self) -> dict[str, str]:
        """Name -> why its entry point cannot be used; the first call looks for entry points."""
        if self._broken is None:
            self._broken = {}
            points = defaultdict[str, list[EntryPoint]](list)
            for point in entry_points(group=self.group):
                points[point.name].append(point)
            for name, same in points.items():
                self._take(name, same)
        return self._broken

    def _take(self, name: str, points: list[EntryPoint]) -> None:
        """Add what the entry points of one name stand for, or note why it cannot be used."""
        places = sorted(f"{point.dist.name} {point.dist.version}" if point.dist else "?" for point in points)
        where = f"{self.group}: the entry point {name} of {' and of '.join(places)}"
        why, spec = "", None
        if name in self.own:
            log.warning("%s is left out: rotssl has its own %s; rename it there", where, name)
            return
        if len(points) > 1:
            why = "one name cannot stand for both; uninstall one of them"
        elif name in self.data:
            why = f"rotssl has a registered {name}; rename it there"
        else:
            try:
                spec = points[0].load()
                why = self.refuse(name, spec)
            except Exception as error:  # of any kind: it runs code that is not ours
                why = f"{points[0].value} cannot be loaded ({type(error).__name__}: {error})"
        if why:
            self.broken[name] = f"{where}: {why}"
        else:
            self.data[name] = spec  # type: ignore[assignment]
            self.sources[name] = f"{places[0]} ({points[0].value})"

    def register(self, name: str, spec: Spec) -> None:
        """Add an entry in this process, in place of one that was added so before.

        Raises:
            ConfigError: the entry cannot be used, or its name is the project's own or that of another package.
        """
        if name in self.broken or (name in self.data and name not in self.added):
            owner = self.sources.get(name, "") or ("another package" if name in self.broken else "rotssl itself")
            raise ConfigError(f"{name}: the name is taken by {owner}; choose another")
        if why := self.refuse(name, spec):
            raise ConfigError(f"{name}: {why}")
        self.data[name] = spec
        self.added.add(name)
        self.sources[name] = "registered by a call"

    def __getitem__(self, name: str) -> Spec:
        """The entry; of a name that is not known, that of an entry point."""
        if (self._broken is not None or name not in self.data) and name in self.broken:
            raise ConfigError(self.broken[name])
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in self.broken or name in self.data  # looking for broken ones adds the others

    def __iter__(self) -> Iterator[str]:
        hidden = self.unlisted | self.broken.keys()
        return iter([name for name in self.data if name not in hidden])

    def __len__(self) -> int:
        return len(list(iter(self)))
