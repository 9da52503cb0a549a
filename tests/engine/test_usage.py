"""Samples of the machines that train: what they hold, where they go, and that nothing depends on them."""

import logging
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rotssl.engine import usage
from rotssl.engine.events import Usage
from rotssl.engine.usage import Machine, sampled
from tests.small_runs import CPU, make_config

CUDA = torch.device("cuda")
HOST = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"}


def made_up_nvml(monkeypatch, **changes):
    """NVML with four GPUs, of which the last has no power meter; used memory is a tenth of its number, of 80 GB."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def by_name(name):
        if name not in ("GPU-two", "GPU-three"):
            raise NVMLError("not found")
        return {"GPU-two": 2, "GPU-three": 3}[name]

    def power(gpu):
        if gpu == 3:
            raise NVMLError("not supported")
        return 100_000 + gpu

    functions = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetHandleByUUID": by_name,
        "nvmlDeviceGetIndex": lambda gpu: gpu,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=90 + gpu),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=gpu * 8e9, total=80e9),
        "nvmlDeviceGetPowerUsage": power,
    }
    for name, function in (functions | changes).items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.mark.parametrize(
    ("visible", "count", "measured"),
    [
        (None, 2, [0, 1]),
        ("2,0,1", 2, [2, 0]),  # as a cluster hands them out
        ("GPU-three, GPU-two", 2, [3, 2]),
        ("GPU-unknown,GPU-two", 2, [2]),
        ("", 1, []),
        ("0,1,2,3", 0, []),  # the run uses none
    ],
)
def test_the_gpus_of_the_run_are_measured_under_their_numbers(monkeypatch, visible, count, measured):
    made_up_nvml(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = Machine(count).sample()
    gpus = {name: value for name, value in found.items() if name not in HOST}
    expected = {}
    for gpu in measured:
        expected |= {f"gpu_{gpu}_utilization_percentage": 90 + gpu, f"gpu_{gpu}_memory_usage_megabytes": gpu * 8000}
        expected |= {f"gpu_{gpu}_memory_usage_percentage": gpu * 10}
        expected |= {} if gpu == 3 else {f"gpu_{gpu}_power_usage_watts": 100}
    assert gpus == expected and set(found) >= HOST
    assert 0 <= found["cpu_utilization_percentage"] <= 100 and 0 < found["system_memory_usage_percentage"] <= 100


@pytest.mark.parametrize("why", ["not installed", "no driver"])
def test_without_nvml_the_rest_is_measured(monkeypatch, why):
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:

        def fail():
            raise OSError("libnvidia-ml.so.1: no such file")

        made_up_nvml(monkeypatch, nvmlInit=fail)
    assert set(Machine(1).sample()) == HOST


def test_the_names_are_mlflow_s(monkeypatch):
    # MLflow's own monitors, on the same machine and the same GPUs.
    module = made_up_nvml(
        monkeypatch, nvmlDeviceGetCount=lambda: 3, nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000
    )
    from mlflow.system_metrics.metrics import gpu_monitor
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monkeypatch.setattr(gpu_monitor, "pynvml", module, raising=False)
    theirs = set()
    for monitor in (CPUMonitor(), gpu_monitor.GPUMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.aggregate_metrics())
    ours = set(Machine(3).sample())
    assert ours <= theirs and theirs - ours == {f"gpu_{gpu}_power_usage_percentage" for gpu in range(3)}


class Told(list):
    """Collects samples; ``enough`` is set at the third one."""

    def __init__(self):
        self.enough = threading.Event()

    def __call__(self, sample):
        self.append(sample)
        if len(self) >= 3:
            self.enough.set()


@pytest.mark.parametrize(("node", "prefix"), [(None, "system/"), (1, "system/node_1/")])
def test_samples_are_taken_until_the_body_ends(tmp_path, node, prefix):
    told = Told()
    config = make_config(tmp_path, "byol", **{"tracking.system_seconds": 0.01})
    with sampled(config, CPU, told, node=node):
        assert told.enough.wait(20)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "usage"]
    thread.join(20)
    assert not thread.is_alive() and {type(sample) for sample in told} == {Usage}
    assert {*told[0].metrics} == {prefix + name for name in HOST}


@pytest.mark.parametrize("fields", [{"tracking.system_seconds": 0}, {"tracking.uri": "off"}])
def test_nothing_is_sampled_where_nobody_wants_it(tmp_path, fields):
    config = make_config(tmp_path, "byol", **{"tracking.system_seconds": 0.01, **fields})
    with sampled(config, CPU, Told()):
        assert "usage" not in {thread.name for thread in threading.enumerate()}


def test_samples_that_cannot_be_sent_end_the_thread_and_not_the_run(tmp_path, caplog):
    def broken(sample):
        raise ConnectionError("the queue is gone")

    with sampled(make_config(tmp_path, "byol", **{"tracking.system_seconds": 0.01}), CPU, broken):
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "usage"]
        thread.join(20)
    assert not thread.is_alive() and "the queue is gone" in caplog.text
    assert [record.levelno for record in caplog.records if record.name == usage.__name__] == [logging.WARNING]
