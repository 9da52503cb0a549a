"""Trials to the slots that a cluster has for them, and who is stopped."""

import itertools

import pytest

from rotssl import config as cfg
from rotssl.config.fields import ConfigError
from rotssl.config.sweep import SweepConfig
from rotssl.runtimes import ray_tune
from tests.runtimes.test_ray_cluster import node

# --- the cluster --------------------------------------------------------------------------------------------------------------


# Nodes | fields | expected count, workers, resources of the Tune actor
FITS = [
    ([node(4)], {}, (4, 1, {"CPU": 1})),
    ([node(4), node(3)], {"scaling.cpus_per_worker": 2}, (3, 1, {"CPU": 2})),
    ([node(4), node(8, alive=False)], {}, (4, 1, {"CPU": 1})),
    ([node(0), node(2)], {}, (2, 1, {"CPU": 1})),
    ([node(4)], {"sweep.concurrency": 3}, (3, 1, {"CPU": 1})),
    ([node(4)], {"scaling.num_workers": 0}, (4, 1, {"CPU": 1})),
    ([node(5)], {"scaling.num_workers": 2}, (2, 2, {"memory": 1})),
    ([node(1), node(1), node(1)], {"scaling.num_workers": 2}, (1, 2, {"memory": 1})),
    ([node(3), node(3)], {"scaling.num_workers": 2, "scaling.cpus_per_worker": 2}, (1, 2, {"memory": 1})),
    ([node(8, 2)], {}, (2, 1, {"CPU": 1, "GPU": 1})),
    ([node(8, 2), node(8)], {}, (2, 1, {"CPU": 1, "GPU": 1})),
    ([node(8, 2)], {"scaling.use_gpu": False}, (8, 1, {"CPU": 1})),
    ([node(3, 2)], {"sweep.gpus_per_trial": 0.5}, (3, 1, {"CPU": 1, "GPU": 0.5})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.5}, (4, 1, {"CPU": 1, "GPU": 0.5})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.3}, (6, 1, {"CPU": 1, "GPU": 0.3})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 1 / 3}, (6, 1, {"CPU": 1, "GPU": 1 / 3})),
    ([node(8, 2)], {"sweep.gpus_per_trial": 0.6}, (2, 1, {"CPU": 1, "GPU": 0.6})),
    ([node(8, 1)], {"sweep.gpus_per_trial": 0.142857}, (6, 1, {"CPU": 1, "GPU": 0.142857})),  # Ray has 0.1429
    ([node(8, 1)], {"sweep.gpus_per_trial": 0.1428}, (7, 1, {"CPU": 1, "GPU": 0.1428})),
    ([node(8, 4)], {"scaling.num_workers": 2}, (2, 2, {"memory": 1})),
    ([node(8, 4)], {"scaling.num_workers": 2, "sweep.gpus_per_trial": 1}, (2, 2, {"memory": 1})),
]


def planned(nodes, fields):
    settings = SweepConfig(**{key[6:]: value for key, value in fields.items() if key.startswith("sweep.")})
    config = cfg.build({key: value for key, value in fields.items() if not key.startswith("sweep.")})
    return ray_tune.plan_slots(config, settings, nodes)


@pytest.mark.parametrize(("nodes", "fields", "expected"), FITS)
def test_as_many_trials_run_as_the_cluster_holds(nodes, fields, expected):
    slots = planned(nodes, fields)
    assert (slots.count, slots.workers, slots.resources) == expected
    gpus = sum(one["Resources"].get("GPU", 0) for one in nodes)
    assert slots.use_gpu is (gpus > 0 and fields.get("scaling.use_gpu", True))


TOO_MUCH = [
    ([node(4)], {"sweep.concurrency": 5}, "sweep.concurrency: got 5, expected at most 4"),
    ([node(8, 2)], {"sweep.concurrency": 3}, "sweep.concurrency: got 3, expected at most 2"),
    ([node(4)], {"sweep.concurrency": 3, "scaling.num_workers": 2}, "sweep.concurrency: got 3, expected at most 2"),
    ([node(4)], {"scaling.use_gpu": True}, "scaling.use_gpu: got true, but the cluster has no GPU"),
    ([node(4), node(8, 2, False)], {"scaling.use_gpu": True}, "scaling.use_gpu: got true"),
    ([node(4), node(4)], {"scaling.cpus_per_worker": 5}, "scaling.cpus_per_worker: got 5"),
    ([node(1), node(8, 8, False)], {"scaling.num_workers": 2}, "scaling.num_workers: got 2"),
    ([node(8, 2)], {"scaling.num_workers": 4}, "scaling.num_workers: got 4"),
    ([node(8, 2)], {"scaling.num_workers": 2, "sweep.gpus_per_trial": 0.5}, "sweep.gpus_per_trial: got 0.5"),
    ([], {}, "scaling.cpus_per_worker: got 1, but a trial of 1 x 1 CPU does not fit into the cluster (0 CPUs, 0 GPUs)"),
]


@pytest.mark.parametrize(("nodes", "fields", "message"), TOO_MUCH)
def test_what_the_cluster_does_not_hold_is_refused_by_name(nodes, fields, message):
    with pytest.raises(ConfigError) as caught:
        planned(nodes, fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- who is stopped -----------------------------------------------------------------------------------------------------------


class FakeTrial:
    """What Tune's schedulers see of a trial."""

    status = "RUNNING"

    def __init__(self, index):
        self.trial_id, self.config = f"t{index}", {"trial": index}


class FakeController:
    """With trials that wait, for which a scheduler could pause others."""

    def get_live_trials(self):
        waiting = FakeTrial(99)
        waiting.status = "PENDING"
        return [waiting]


class Race:
    """Trials in lockstep under a scheduler; a stopped one says nothing more."""

    def __init__(self, configs, **settings):
        self.configs = [cfg.build({"optim.warmup_epochs": 0, **config}) for config in configs]
        self.scheduler = ray_tune.scheduler(SweepConfig(**settings), self.configs)
        self.trials = [FakeTrial(i) for i in range(len(configs))]
        for trial in self.trials:
            self.scheduler.on_trial_add(FakeController(), trial)

    def tell(self, index, epoch, accuracy):
        metrics = {} if accuracy is None else {"knn/top1": accuracy}
        result = {"epoch": epoch, "training_iteration": 1, **metrics}
        action = self.scheduler.on_trial_result(FakeController(), self.trials[index], result)
        assert action in ("CONTINUE", "STOP")
        return action

    def run(self, accuracy):
        """Epoch at which each trial was stopped, or None; accuracy is a function of trial and epoch."""
        stopped = dict.fromkeys(range(len(self.configs)))
        for epoch in range(1, 1 + max(config.train.epochs for config in self.configs)):
            for index, config in enumerate(self.configs):
                if stopped[index] is not None or epoch > config.train.epochs:
                    continue
                if self.tell(index, epoch, accuracy(index, epoch)) == "STOP":
                    stopped[index] = epoch
        return list(stopped.values())


stopping = pytest.mark.parametrize("rule", ["asha", "median"])
WEIGHTS = (0, 1, 2, 3, 4)


def group(epochs, weights=WEIGHTS, **fields):
    return [{"rotation.weight": weight, "train.epochs": epochs, **fields} for weight in weights]


def rising(index, epoch):
    return 0.5 - 0.05 * (index % 5) + 0.01 * epoch  # the first of five is the best


@pytest.mark.contract
@stopping
@pytest.mark.parametrize(
    "other",
    [
        group(16),
        group(8, **{"method.name": "simclr"}),
        group(8, **{"data.limit": 512}),
        group(8, **{"evaluation.knn_every": 2}),
        group(8, **{"evaluation.holdout": 0.2}),
    ],
    ids=["budget", "method", "data", "how often", "holdout"],
)
def test_only_what_is_alike_is_compared(rule, other):
    alone = Race(group(8), scheduler=rule).run(rising)
    assert alone[0] is None and sum(epoch is not None for epoch in alone) >= 2  # there is something to see
    for shift in (-0.4, 0.4):
        together = Race([*group(8), *other], scheduler=rule)
        found = together.run(lambda index, epoch, shift=shift: rising(index, epoch) + shift * (index >= 5))
        assert found == [*alone, *found[5:]]
        assert len(together.scheduler.parts) == 2


@stopping
def test_seeds_weights_and_rates_are_compared(rule):
    configs = [{"train.epochs": 8, "train.seed": 0}, {"train.epochs": 8, "train.seed": 1}]
    race = Race(
        [*configs, {"train.epochs": 8, "optim.lr": 0.1}, {"train.epochs": 8, "model.norm": "group"}], scheduler=rule
    )
    race.run(rising)
    assert len(race.scheduler.parts) == 1


@stopping
def test_a_baseline_goes_on_but_counts(rule):
    weights = (1, 2, 0, 3, 4)
    worst = Race(group(8, weights), scheduler=rule).run(lambda i, epoch: 0.01 if i == 2 else rising(i, epoch))
    assert worst[2] is None  # last of all, in every epoch
    # With jigsaw it is no baseline.
    jigsaw = Race([*group(8, (1, 2, 3)), *group(8, (0,), **{"jigsaw.weight": 1})], scheduler=rule)
    assert jigsaw.run(lambda i, epoch: 0.01 if i == 3 else 0.5)[3] is not None
    # Good baselines stop others, which without them would go on.
    seeds = [{"rotation.weight": 0, "train.epochs": 8, "train.seed": seed} for seed in range(2)]
    assert Race([*seeds, *group(8, (1,))], scheduler=rule).run(rising)[2] is not None
    assert Race(group(8, (1,)), scheduler=rule).run(rising) == [None]


@stopping
def test_no_trial_is_stopped_in_its_last_epoch_or_before_its_time(rule):
    for grace in (4, 8, 100):
        found = Race(group(8), scheduler=rule, grace_epochs=grace).run(rising)
        assert all(epoch is None or grace <= epoch < 8 for epoch in found)
    assert any(Race(group(8), scheduler=rule, grace_epochs=4).run(rising))
    assert Race(group(1), scheduler=rule).run(rising) == [None] * 5


@stopping
def test_what_is_told_again_after_a_restart_changes_nothing(rule):
    once, twice = Race(group(8), scheduler=rule), Race(group(8), scheduler=rule)
    for epoch, index in itertools.product(range(1, 4), (0, 1)):
        for race in (once, twice):
            assert race.tell(index, epoch, rising(index, epoch)) == "CONTINUE" or index == 1
    for epoch in range(1, 4):
        assert twice.tell(0, epoch, 0.0) == "CONTINUE"
    assert [part.debug_string() for part in twice.scheduler.parts.values()] == [
        part.debug_string() for part in once.scheduler.parts.values()
    ]
    for index, accuracy in ((2, 0.2), (3, 0.44), (4, 0.9)):
        assert once.tell(index, 2, accuracy) == twice.tell(index, 2, accuracy)


@stopping
def test_an_epoch_without_accuracy_is_passed_over(rule):
    found = Race(group(8), scheduler=rule).run(lambda i, epoch: None if epoch < 4 else rising(i, epoch))
    assert min(epoch for epoch in found if epoch) >= 4
    race = Race(group(8), scheduler=rule)
    assert race.tell(1, 3, None) == "CONTINUE" and race.scheduler.seen == {}


@stopping
def test_time_is_our_epoch_and_not_tune_s_iteration(rule):
    # Tune's iteration stays 1 in these races; by it nobody would get beyond the first rung.
    found = Race(group(8), scheduler=rule).run(lambda i, epoch: 0.5 if epoch < 4 else rising(i, epoch))
    assert {epoch for epoch in found if epoch} <= set(range(4, 8)) and any(found)


def test_asha_halves_at_rungs_that_the_factor_sets():
    race = Race(group(9, (1, 2, 3)), scheduler="asha", reduction_factor=3)
    (part,) = race.scheduler.parts.values()
    assert [rung for rung in (1, 3, 9) if f"Iter {rung}.000" in part.debug_string()] == [1, 3, 9]
    assert "Iter 2.000" not in part.debug_string()


@stopping
def test_a_scheduler_can_be_pickled_on_the_way(rule):
    from ray import cloudpickle

    race = Race(group(8), scheduler=rule)
    for index in range(3):
        race.tell(index, 1, rising(index, 1))
    again = Race(group(8), scheduler=rule)
    again.scheduler = cloudpickle.loads(cloudpickle.dumps(race.scheduler))
    assert again.scheduler.seen == {0: 1, 1: 1, 2: 1}
    for index in (3, 4):
        assert again.tell(index, 1, 0.1) == race.tell(index, 1, 0.1)


def test_without_a_scheduler_nobody_is_stopped():
    race = Race(group(8), scheduler="none")
    assert race.run(rising) == [None] * 5


def test_tune_copies_no_login_into_an_environment_that_ray_logs():
    ray_tune._import_tune()
    from ray.tune.execution import class_cache

    assert [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")] == []
    assert "RAY_CHDIR_TO_TRIAL_DIR" in class_cache.ENV_VARS_TO_PROPAGATE
