"""How many operations a step is made of: on a fast GPU, the host takes longer to launch them than the GPU to compute them."""

import pytest
import torch

from rotssl.config.methods import METHODS
from rotssl.engine import hardware
from tests.devices import Launches
from tests.small_runs import make_config, trainer

PLAIN = {"rotation.weight": 0}
SOME = ("byol", "vicreg")
MOST = {
    "simclr": 284,
    "mocov2": 317,
    "byol": 452,
    "simsiam": 374,
    "swav": 336,
    "barlow": 411,
    "vicreg": 431,
    "dino": 391,
}


@pytest.mark.contract
@pytest.mark.parametrize(
    ("method", "fields", "most"),
    [
        pytest.param("byol", PLAIN, 399, id="byol, plain"),
        pytest.param("byol", {"rotation.share": 0.5, "rotation.conditioned": True}, 488, id="byol, the default"),
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
