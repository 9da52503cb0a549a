"""How many operations a step is made of: on a fast GPU, the host takes longer to launch them than the GPU to compute them.

And that it waits for none of them.
"""

import numpy as np
import pytest
import torch

from rotssl.base import sending
from rotssl.config.methods import METHODS
from rotssl.data.augment import masked_cut, masked_view
from rotssl.engine import encoding, hardware
from rotssl.engine.pretrainer import build_pretrainer
from tests.devices import Crossings, Launches, Waits
from tests.engine.test_contract import TASKS
from tests.small_runs import batch, make_config, trainer

PLAIN = {"rotation.weight": 0}
SOME = ("byol", "vicreg")
MOST = {
    "simclr": 224,
    "mocov2": 284,
    "byol": 399,
    "simsiam": 325,
    "swav": 276,
    "barlow": 378,
    "vicreg": 398,
    "dino": 336,
}


@pytest.mark.contract
@pytest.mark.parametrize(
    ("method", "fields", "most"),
    [
        pytest.param("byol", PLAIN, 367, id="byol, plain"),
        pytest.param("byol", {"rotation.share": 0.5, "rotation.conditioned": True}, 440, id="byol, the default"),
        *(
            pytest.param(method, {}, MOST[method], id=method, marks=() if method in SOME else pytest.mark.exhaustive)
            for method in METHODS
        ),
    ],
)
def test_a_step_of_a_resnet_18_launches_few_operations(tmp_path, monkeypatch, method, fields, most):
    monkeypatch.setattr(hardware, "weight_layout", lambda device, images: images)  # as on GPUs
    shape = {
        "encoder.name": "resnet18",
        "encoder.stem": "cifar",
        "data.image_size": 32,
        "data.limit": 64,
        "model.norm": "batch",
    }
    run = trainer(make_config(tmp_path, method, **shape, **fields))
    run.parallel.train()
    first, (images, ctx), *_ = run.batches(0)
    run.step(*first)  # which saves a picture, and makes the optimizer's state
    with torch.no_grad():
        views = run.augment(images, ctx)
    monkeypatch.setattr(run, "augment", lambda *_: views)  # on GPUs they are compiled
    with Launches() as launches:
        run.step(images, ctx)
    assert launches.found.total() <= most, launches.found.most_common()


# Each method with the default form, and the others with one that has a teacher. The rest of the product is for make test-all.
CHOSEN = ("extra", "jigsaw", "disjoint", "four way, half", "equivariance")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("method", "task"),
    [
        pytest.param(method, task, id=f"{form}-{method}", marks=() if few else pytest.mark.exhaustive)
        for form, task in TASKS.items()
        for method in METHODS
        for few in [form == "shared" or (method == "byol" and form in CHOSEN)]
    ],
)
def test_a_step_waits_for_no_value_and_copies_nothing_but_what_was_drawn(tmp_path, method, task):
    config = make_config(tmp_path, method, **({"data.limit": 4 * task.get("train.batch_size", 16)} | task))
    # All of a step, with views as they are made on GPUs: no value is read, and no shape depends on one.
    run = trainer(config)
    run.augment.masked = masked_view, masked_cut
    first, second, *_ = run.batches(0)
    run.step(*first)  # which saves a picture
    with Waits() as waits:
        run.step(*second)
    assert waits.found == []
    # On a device without values, to which what the host has must be copied.
    meta = torch.device("meta")
    with meta:
        model = build_pretrainer(config, meta)
    views, ctx = batch(config, model)
    views = views.map(lambda view: view.to(meta))
    with sending.noted() as drawn, Crossings(drawn) as crossings:
        model(views, ctx).loss.backward()
        model.after_step(ctx)
    assert crossings.found == []
    assert all(isinstance(array, np.ndarray) and array.dtype == np.int64 for array in drawn)


def waits(overrides):
    """What a worker waits for in its second step."""
    run = trainer(make_config(**overrides))
    run.parallel.train()
    first, second, *_ = run.batches(0)
    run.step(*first)
    with Waits() as found:
        run.step(*second)
    return found.found


def test_workers_that_share_statistics_wait_for_no_value(tmp_path, pool):
    fields = {"folder": tmp_path, "method": "byol", "data.limit": 64, "rotation.share": 0.5}
    assert pool.run(waits, fields) == [[], []]


def test_a_shuffled_batch_is_sent_without_a_wait():
    _, ctx = batch(
        make_config("unused", "mocov2"), build_pretrainer(make_config("unused", "mocov2"), torch.device("cpu"))
    )
    with sending.noted() as drawn, Crossings(drawn) as crossings:
        there, back = encoding.shuffled(16, torch.device("meta"), ctx)
    assert crossings.found == [] and len(drawn) == 1 and there.is_meta and back.is_meta
