"""The rules between the fields of a configuration."""

from rotssl.base.address import without_login
from rotssl.config import sections
from rotssl.config.datasets import DATASETS
from rotssl.config.fields import ConfigError, nearest, require
from rotssl.config.methods import METHODS
from rotssl.config.sections import Config
from rotssl.config.tasks import TASKS
from rotssl.config.views import SMALLEST


def check(c: Config) -> None:
    """Check the rules between fields.

    Raises:
        ConfigError: a rule is broken.
    """
    _check_data(c.data)
    _check_views(c)
    _check_split(c)
    _check_encoder(c.encoder)
    for name in TASKS:
        _check_task(c, name)
    _check_head(c)
    _check_equivariance(c)
    _check_method_weight(c)
    _check_oracle(c)
    _check_training(c)
    _check_evaluation(c)
    _check_results(c)
    if c.scaling.num_workers != "auto":
        check_workers(c, int(c.scaling.num_workers))


REMOTE = ("s3", "gs", "abfs")  # object stores that pyarrow knows
INSTEAD = "it belongs into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def no_login(key: str, address: str | None, instead: str) -> None:
    """Check that an address has no user name and no password: whoever starts a job shows its command line to all.

    Raises:
        ConfigError: it has; the message does not repeat them.
    """
    bare = without_login(address or "")
    require(bare == (address or ""), key, bare, f"no login in the address; {instead}")


def _check_data(data: sections.DataConfig) -> None:
    name = data.name
    expected = DATASETS[name].root or f"the folder that holds {name}"
    kind = DATASETS[name].kind
    require(kind == "package" or data.root is not None, "data.root", None, expected)
    no_login("data.root", data.root, "credentials come from the environment")
    downloaded = kind == "torchvision"
    require(downloaded or not data.download, "data.download", "true", f"false: {name} cannot be downloaded")
    in_memory = kind in ("folders", "packed") or data.store != "disk"
    require(in_memory, "data.store", "disk", f"auto or memory: {name} is always read into memory")


def _check_views(c: Config) -> None:
    views, name = c.views, c.method.name
    start = views.size_start
    fits = start is None or start < 1 or (start == int(start) and start >= SMALLEST)
    expected = f"whole pixels, at least {SMALLEST}, or a share below 1"
    require(fits, "views.size_start", start, expected)
    scales = {
        "views.global_scale": views.global_scale,
        "views.local_scale": views.local_scale,
    }
    for key, (low, high) in scales.items():
        require(low <= high, key, f"({low}, {high})", "the smaller share first")
    count = views.global_count
    for key, values in (("blur", views.blur), ("solarize", views.solarize)):
        expected = f"1, or one for each of {count} views"
        require(len(values) in (1, count), f"views.{key}", f"{len(values)} values", expected)
    require(views.jitter[3] <= 0.5, "views.jitter", f"a hue of {views.jitter[3]}", "a hue of at most 0.5")
    takers = [m for m, spec in METHODS.items() if spec.multi_crop]
    fits = views.local_count == 0 or METHODS[name].multi_crop
    require(
        fits, "views.local_count", views.local_count, f"0: {name} takes no local views, only {', '.join(takers)} do"
    )
    fits = count == 2 or not METHODS[name].two_views
    require(fits, "views.global_count", count, f"2: {name} needs exactly two")
    fits = views.good_crops == 0 or views.min_overlap == 0
    require(fits, "views.min_overlap", views.min_overlap, "0 with views.good_crops: a crop is drawn for one reason")
    apart = c.rotation.on and c.rotation.mode == "in_place" and c.rotation.angles == "independent"
    expected = "shared with views.local_count: local views turn with their image"
    require(not apart or views.local_count == 0, "rotation.angles", "independent", expected)


def _check_split(c: Config) -> None:
    if c.views.split == 1:
        return
    start, rotation = c.views.size_start, c.rotation
    require(
        start is None or start < 1 or start % 2 == 0, "views.size_start", start, "an even side: views.split 2 halves it"
    )
    weight = c.equivariance.weight
    require(not c.equivariance.on, "equivariance.weight", weight, "0 with views.split 2: it needs maps of whole views")
    if not rotation.on:
        return
    modes = "in_place, extra, four_way or augment with views.split 2"
    require(rotation.mode != "disjoint", "rotation.mode", "disjoint", modes)
    require(not rotation.conditioned, "rotation.conditioned", "true", "false with views.split 2")
    fits = rotation.mode not in ("in_place", "augment") or rotation.head_on != "projector"
    places = "encoder or a stage with views.split 2: no projection is of a whole view"
    require(fits, "rotation.head_on", "projector", places)


def _check_encoder(encoder: sections.EncoderConfig) -> None:
    known, timm = ("small", *sections.RESNETS), encoder.name.startswith("timm/")
    expected = f"one of {', '.join(known)}, or timm/NAME{nearest(encoder.name, known)}"
    require(timm or encoder.name in known, "encoder.name", repr(encoder.name), expected)
    for key in ("patch_size", "drop_path"):
        value, default = getattr(encoder, key), getattr(sections.EncoderConfig, key)
        require(timm or value == default, f"encoder.{key}", value, f"{default}: it applies to timm's encoders only")
    if timm:
        require(
            encoder.stem != "cifar", "encoder.stem", "cifar", "imagenet or auto: timm's encoders keep their own stem"
        )
        require(not encoder.zero_init, "encoder.zero_init", "true", "false: timm initialises its encoders itself")


def _check_task(c: Config, name: str) -> None:
    task = getattr(c, name)
    task.check()
    fits = task.share == type(task).share or not task.on or task.weight == "auto"
    require(fits, f"{name}.share", task.share, f"no share with {name}.weight {task.weight}; it sets the weight auto")


def _check_method_weight(c: Config) -> None:
    weight, shared = c.tasks.method_weight, [name for name, task in c.active().items() if task.weight == "auto"]
    require(weight == 1 or not shared, "tasks.method_weight", weight, "1 with a share, which is measured against it")
    teaching = [name for name in c.active() if name != "rotation" or c.rotation.mode != "augment"]
    require(weight > 0 or bool(teaching), "tasks.method_weight", weight, "more than 0 without an auxiliary task")


def _check_head(c: Config) -> None:
    place, name = c.rotation.head_on, c.encoder.name
    lacks = {"small": "stage2"}.get(name, "stem" if name.startswith("timm/") else "")
    expected = f"another place: {name} has no {place}"
    require(not c.rotation.on or place != lacks, "rotation.head_on", place, expected)


def _check_equivariance(c: Config) -> None:
    if not (c.equivariance.on and c.rotation.on):
        return
    mode, read = c.rotation.mode, c.rotation.head_on
    expected = "extra or four_way with equivariance, which takes images for itself, or rotation.weight 0"
    require(mode in ("extra", "four_way"), "rotation.mode", mode, expected)
    expected = "encoder or projector with equivariance, which reads the stage"
    require(read in ("encoder", "projector"), "rotation.head_on", read, expected)


def _check_oracle(c: Config) -> None:
    oracle, name = c.oracle, c.method.name
    having = " and ".join(m for m, spec in METHODS.items() if spec.negatives)
    for key, asked, off in (("false_negatives", oracle.on, 0), ("log", oracle.log, "false")):
        fits = METHODS[name].negatives or not asked
        given = str(getattr(oracle, key)).lower()
        require(fits, f"oracle.{key}", given, f"{off}: {name} has no negatives, only {having} have")


def reads_labels(c: Config) -> bool:
    """Whether the training needs labels, for its loss or to log a share."""
    return METHODS[c.method.name].labels or c.oracle.reads_labels


def labels_used(c: Config) -> str:
    """How labels change what a run learns, in words for tags and reports; empty if they do not."""
    how = ["supervised training, cross-entropy with the labels of all images"] if METHODS[c.method.name].labels else []
    return "; ".join([*how, *filter(None, [str(c.oracle)])])


def check_labels(c: Config, labelled: bool) -> None:
    """Check that a run which reads labels while it trains has some.

    Raises:
        ConfigError: it has none.
    """
    if METHODS[c.method.name].labels:
        key, value = "method.name", c.method.name
    elif c.oracle.on:
        key, value = "oracle.false_negatives", str(c.oracle.false_negatives)
    else:
        key, value = "oracle.log", "true"
    fits = labelled or not reads_labels(c)
    require(fits, key, value, f"images with labels, which {c.data.name} in {c.data.root} has not")


def check_saliency(c: Config) -> None:
    """Check that a run which looks at pictures before it draws crops has them in memory or on a disk, with ``data.store`` known.

    Raises:
        ConfigError: they are decoded for their crops.
    """
    decoded = DATASETS[c.data.name].kind == "packed" and c.data.store == "disk"
    for key, off in (("good_crops", 0), ("log_saliency", False)):
        value = getattr(c.views, key)
        expected = (
            f"{str(off).lower()}: pictures of a packed set of this size are decoded when their crops are known already"
        )
        require(value == off or not decoded, f"views.{key}", str(value).lower(), expected)


def _check_training(c: Config) -> None:
    train, optim, epochs = c.train, c.optim, c.train.epochs
    most = f"at most train.epochs ({epochs})"
    require(train.stop_after is None or train.stop_after <= epochs, "train.stop_after", train.stop_after, most)
    fits = optim.warmup_epochs == "auto" or optim.warmup_epochs <= epochs or train.budget is not None
    require(fits, "optim.warmup_epochs", optim.warmup_epochs, most)
    for key in ("warmup_lr", "final_lr"):
        value = getattr(optim, key)
        require(value == 0 or optim.lr != "auto", f"optim.{key}", value, "0 with lr auto")
        require(optim.lr == "auto" or value <= optim.lr, f"optim.{key}", value, f"at most optim.lr ({optim.lr})")
    require(optim.lr != "auto" or optim.lr_scale == "none", "optim.lr_scale", optim.lr_scale, "none with lr auto")
    means = [m for m, spec in METHODS.items() if spec.per_image]
    expected = f"1: the loss of {c.method.name} is not a mean over images (a batch can be split for {', '.join(means)})"
    require(train.accumulate == 1 or METHODS[c.method.name].per_image, "train.accumulate", train.accumulate, expected)
    whole = c.rotation.on and c.rotation.loss == "contrastive"
    expected = "1: rotation.loss contrastive compares all images of a step"
    require(train.accumulate == 1 or not whole, "train.accumulate", train.accumulate, expected)


def _check_evaluation(c: Config) -> None:
    evaluation, name = c.evaluation, c.method.name
    fits = evaluation.network == "student" or METHODS[name].teacher
    require(fits, "evaluation.network", evaluation.network, f"student: {name} has no teacher")
    least = evaluation.bank is None or evaluation.bank >= evaluation.knn_k
    require(least, "evaluation.bank", evaluation.bank, f"at least evaluation.knn_k, {evaluation.knn_k}")


def _check_results(c: Config) -> None:
    no_login("tracking.uri", c.tracking.uri, INSTEAD)
    for key in ("experiment", "run_name"):
        value = getattr(c.tracking, key)
        bad = value is not None and (value in (".", "..") or any(ch in value for ch in "/\\\0\n"))
        require(not bad, f"tracking.{key}", repr(value), "a name without slashes that can name a folder")
    path = c.storage.path
    if path is not None:
        no_login("storage.path", path, "give credentials by the environment")
        kind, mark, _ = path.partition("://")
        slash = next((kind for kind in REMOTE if path.startswith(f"{kind}:/") and not mark), "")
        require(not slash, "storage.path", repr(path), f"two slashes: {slash}://BUCKET/PREFIX")
        known = not mark or kind in REMOTE
        require(
            known, "storage.path", repr(path), f"a folder shared by all nodes, or {', '.join(REMOTE)}://BUCKET/PREFIX"
        )
        if mark:
            return
        odd = any(ch in path for ch in "?#\0")
        require(not odd, "storage.path", repr(path), "a path without ? and #, which have a meaning in MLflow's URI")


def check_workers(c: Config, num_workers: int) -> None:
    """Check the rules that depend on the number of workers.

    Raises:
        ConfigError: a rule is broken.
    """
    workers, batch, parts = max(1, num_workers), c.train.batch_size, c.train.accumulate
    passes = f"the {workers} workers" + (f" x {parts} passes" if parts > 1 else "")
    require(batch % (workers * parts) == 0, "train.batch_size", batch, f"a multiple of {passes}")
    each = c.train.share(workers) // parts
    require(each >= 2, "train.batch_size", batch, f"at least 2 images for each of {passes}")
    if c.model.norm == "split":
        splits = c.model.norm_splits
        require(parts == 1, "train.accumulate", parts, "1 with model.norm split")
        disjoint = c.rotation.on and c.rotation.mode == "disjoint"
        require(
            not disjoint, "rotation.mode", "disjoint", "another one with model.norm split, whose parts must be alike"
        )
        require(not c.equivariance.on, "equivariance.weight", c.equivariance.weight, "0 with model.norm split")
        require(splits % workers == 0, "model.norm_splits", splits, f"a multiple of {passes}")
        fits = batch % splits == 0 and batch >= 2 * splits
        require(
            fits, "train.batch_size", batch, f"a multiple of model.norm_splits ({splits}), and at least twice as many"
        )
    for section in c.active().values():
        section.check_share(each)


def unshared(c: Config, num_workers: int) -> str:
    """Why this many workers cannot share the batch, in one line; empty if they can."""
    try:
        check_workers(c, num_workers)
    except ConfigError as error:
        return str(error)
    return ""
