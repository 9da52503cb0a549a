"""The registry of data sets: everything known about them before they are read. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rotssl.config.fields import load_class

Channels = tuple[float, ...]


@dataclass(frozen=True)
class DatasetSpec:
    """A registered data set.

    Attributes:
        kind: ``package``: shipped with rotssl or synthetic; ``torchvision``: read by torchvision; ``folders``: files in folders;
            ``packed``: made by jobs/pack.py.
        target: ``module:name`` of the reader: a function without arguments (package), torchvision's class, or a function of
            the root that finds the files (folders).
        side: side of the images in pixels, if known in advance.
        channels: number of channels of the images.
        mean: mean of each channel in [0, 1]; ImageNet's if not measured.
        std: standard deviation of each channel, likewise.
        sizes: numbers of images in train, validation (0: no such split) and test, if known in advance.
        folder: folder below ``data.root`` that holds ``files`` (train) and ``test_files``.
        root: what ``data.root`` must be; empty: the folder that holds the data set.
        test_target: ``module:name`` of the function that finds the labelled test split of a data set in folders, from the root
            and the classes; empty: it has none.
    """

    kind: Literal["package", "torchvision", "folders", "packed"]
    target: str
    side: int | None = None
    channels: int = 3
    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)
    sizes: tuple[int, int, int] = (0, 0, 0)
    folder: str = ""
    files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    root: str = ""
    test_target: str = ""

    def load(self) -> Any:
        """Import and return the reader."""
        return load_class(self.target)


_FASHION: dict[str, Any] = {"side": 28, "channels": 1, "mean": (0.286,), "std": (0.353,)}
DATASETS = {
    "fashion-mnist-sample": DatasetSpec("package", "rotssl.data.packaged:sample", sizes=(5000, 1000, 1000), **_FASHION),
    "fashion-mnist": DatasetSpec(
        "torchvision",
        "torchvision.datasets:FashionMNIST",
        sizes=(60_000, 0, 10_000),
        folder="FashionMNIST/raw",
        files=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test_files=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        **_FASHION,
    ),
    "cifar10": DatasetSpec(
        "torchvision",
        "torchvision.datasets:CIFAR10",
        side=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        sizes=(50_000, 0, 10_000),
        folder="cifar-10-batches-py",
        files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_files=("test_batch",),
    ),
    "cifar100": DatasetSpec(
        "torchvision",
        "torchvision.datasets:CIFAR100",
        side=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        sizes=(50_000, 0, 10_000),
        folder="cifar-100-python",
        files=("train",),
        test_files=("test",),
    ),
    "tiny-imagenet": DatasetSpec("folders", "rotssl.data.folders:scan_tiny_imagenet", side=64),
    "imagefolder": DatasetSpec(
        "folders",
        "rotssl.data.folders:scan",
        root="a folder of images",
        test_target="rotssl.data.folders:scan_test",
    ),
    "packed": DatasetSpec("packed", "rotssl.data.packed_sets:load", root="a packed set, a folder or an address"),
    "synthetic": DatasetSpec("package", "rotssl.data.packaged:synthetic", side=32, sizes=(1024, 256, 256)),
}
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]
