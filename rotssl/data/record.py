"""Which image files a run was started with, so that a resumed run notices others. This module does not import torch."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from rotssl.base.paths import AnyPath, write_whole
from rotssl.data.images import Sums
from rotssl.data.reading import digest

FILE = "images.npz"  # in the run's folder


@dataclass(frozen=True)
class Record:
    """Class names, and for each file a checksum of its name below the data's folder and one of its content.

    It does not change if the folder moves, and does not depend on how the images are decoded or stored.
    """

    classes: tuple[str, ...]
    names: Sums
    contents: Sums

    @classmethod
    def of(cls, files: Sequence[str], top: str, classes: Sequence[str], contents: Sums) -> "Record":
        """The record of files below a folder, with the checksums of their contents."""
        names = [digest(os.fsencode(os.path.relpath(file, top))) for file in files]
        return cls(tuple(classes), np.array(names, np.uint64), contents)

    def save(self, folder: AnyPath) -> None:
        """Write it into a run's folder, whole."""
        folder.mkdir(parents=True, exist_ok=True)
        classes = np.frombuffer("\0".join(self.classes).encode("utf-8", "surrogateescape"), np.uint8)
        file = BytesIO()
        np.savez(file, classes=classes, names=self.names, contents=self.contents)
        write_whole(folder / FILE, file.getvalue())

    @classmethod
    def read(cls, folder: AnyPath) -> "Record | None":
        """The record in a run's folder; None if there is none.

        Raises:
            ValueError: it can't be read.
        """
        try:
            with np.load(BytesIO((folder / FILE).read_bytes()), allow_pickle=False) as found:
                text = found["classes"].tobytes().decode("utf-8", "surrogateescape")
                return cls(tuple(text.split("\0")) if text else (), found["names"], found["contents"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{folder / FILE} cannot be read ({type(error).__name__})") from error

    @classmethod
    def compared(cls, ours: "Record | None", folder: AnyPath) -> str:
        """How the images differ from those that the run in a folder was started with; empty also without a record of either.

        Raises:
            ValueError: its record can't be read.
        """
        before = cls.read(folder)
        return ours.differences(before) if ours and before else ""

    def same(self, before: "Record", part: bool) -> bool:
        """Whether these are the classes and the images of an earlier start, whatever the files are called.

        Args:
            before: of that start.
            part: whether it took only a part of its set (``data.limit``): then more images may be here.
        """
        if self.classes != before.classes:
            return False
        if part:
            return bool(np.isin(before.contents, self.contents).all())
        return np.array_equal(np.sort(self.contents), np.sort(before.contents))

    def differences(self, before: "Record") -> str:
        """How these images differ from those of an earlier start, in words; empty if they are the same."""
        now, then = set(self.classes), set(before.classes)
        gone = [name for name in before.classes if name not in now]
        new = [name for name in self.classes if name not in then]
        if len(gone) == len(new) and gone and np.array_equal(np.sort(self.contents), np.sort(before.contents)):
            return "classes were renamed: " + ", ".join(f"{a} to {b}" for a, b in zip(gone, new, strict=True))
        words = [f"class {name} was removed" for name in gone] + [f"class {name} was added" for name in new]
        added = int((~np.isin(self.names, before.names)).sum())
        removed = int((~np.isin(before.names, self.names)).sum())
        ours, theirs = (dict(zip(one.names.tolist(), one.contents.tolist(), strict=True)) for one in (self, before))
        replaced = sum(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())
        counts = {"added": added, "removed": removed, "replaced": replaced}
        words += [
            f"{count:,} images {'was' if count == 1 else 'were'} {word}" for word, count in counts.items() if count
        ]
        return ", ".join(words).replace("1 images was", "1 image was")
