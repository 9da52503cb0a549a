"""The code of a method from outside: what is missing is said before a run starts, also on another node."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

from rotssl import config as cfg
from rotssl.base.step import StepOutput
from rotssl.config.fields import ConfigError, opt
from rotssl.config.methods import METHODS, MethodSpec, Mocov2Config, SimclrConfig, register_method
from rotssl.lifecycle import prepare
from rotssl.methods.base import Method
from rotssl.methods.mocov2 import MoCoV2
from rotssl.methods.simclr import SimCLR
from tests.own_methods import EXAMPLE, forgotten
from tests.programs import SMALL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SimclrConfig):
    name: str = dataclasses.field(default="here", metadata={"help": "", "bounds": {}, "later": False})


class Whole(SimCLR):
    pass


class Lacking(Method):
    pass


class Traitless(Method):
    def __init__(self, config, dim):
        super().__init__()

    def loss(self, z, z_teacher, ctx):
        raise NotImplementedError


class Failing(SimCLR):
    def __init__(self, config, dim):
        raise RuntimeError("no such table")


class Teaching(SimCLR):
    uses_teacher = True


@pytest.fixture(autouse=True)
def fresh():
    with forgotten():
        yield


def started(target, tmp_path, config=Config, given=None, **changes):
    register_method("here", MethodSpec(config, target, "sgd", 0.1, **changes))
    fields = {key: value for key, value in SMALL.items() if not key.startswith("rotation.")}
    return prepare(cfg.build({**fields, **(given or {}), "method.name": "here", "storage.path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("nowhere:Here", {}, "nowhere:Here cannot be imported .No module named 'nowhere'."),
        (f"{__name__}:Lost", {}, ".* cannot be imported .*has no attribute 'Lost'"),
        (nn.Linear, {}, ".*Linear.* is not a subclass of rotssl.Method"),
        (Lacking, {}, "the class Lacking lacks loss; rotssl.Method says"),
        (Traitless, {}, "the class Traitless does not set uses_teacher, joint_views, projector;"),
        (Failing, {}, r"Failing\(config, 16\) failed .no such table."),
        (Teaching, {}, "Teaching has uses_teacher True, but its MethodSpec has teacher False"),
        (Teaching, {"teacher": True}, "the class Teaching has a teacher, but lacks teacher_momentum"),
    ],
)
def test_what_is_missing_is_said_before_a_run_starts(tmp_path, target, changes, words):
    with pytest.raises(ConfigError, match=f"^method here: {words}"):
        started(target, tmp_path, **changes)


class Deaf(SimCLR):
    def consult(self, oracle):
        pass


class Counting(SimCLR):
    def loss(self, z, z_teacher, ctx):
        found, self.oracle = self.oracle, None
        out = super().loss(z, z_teacher, ctx)
        self.oracle = found
        return StepOutput(out.loss, found.judge(ctx.classes, ctx.classes, 0)[1])


class Refusing(SimCLR):
    def consult(self, oracle):
        raise RuntimeError("no labels here")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyConfig(Mocov2Config):
    name: str = opt("here", "Pretraining method.")


REMOVES, COUNTS = {"oracle.false_negatives": 0.1}, {"oracle.log": True}


@pytest.mark.parametrize(
    ("target", "oracle", "words"),
    [
        (Deaf, REMOVES, "Deaf never asks self.oracle.judge"),
        (Deaf, COUNTS, "Deaf never asks self.oracle.judge"),
        (Counting, REMOVES, "Counting has the same loss if self.oracle.judge removes all false negatives"),
    ],
)
def test_a_method_that_an_oracle_would_not_change_is_refused(tmp_path, target, oracle, words):
    words = f"^method here: its MethodSpec has negatives True, but {words}: let its loss do so, or leave negatives out"
    with pytest.raises(ConfigError, match=words):
        started(target, tmp_path, given=oracle, negatives=True)
    assert started(target, tmp_path, negatives=True)  # it is tried only where an oracle is asked for
    with pytest.raises(ConfigError, match=r"^method here: a loss of Refusing with an oracle failed .no labels here."):
        started(Refusing, tmp_path, given=oracle, negatives=True)


@pytest.mark.parametrize("temperature", [0.001, 0.2])
def test_methods_that_ask_an_oracle_are_taken(tmp_path, temperature):
    for target, config, traits in ((Whole, Config, {}), (MoCoV2, KeyConfig, {"teacher": True, "two_views": True})):
        for oracle in (REMOVES, COUNTS):
            given = {**oracle, "method.temperature": temperature}
            assert started(target, tmp_path, config, given, negatives=True, **traits)
    assert started(Counting, tmp_path, given=COUNTS, negatives=True)


def test_the_check_leaves_the_random_numbers_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.random.get_rng_state()
    started(Whole, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert METHODS["here"].load() is Whole


def test_a_method_of_a_module_that_another_node_lacks_is_one_line_there(tmp_path, monkeypatch):
    from rotssl.runtimes import ray_methods

    (tmp_path / "own_module.py").write_text(
        "from tests.methods.test_outside import Config, Whole\nclass Own(Whole): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_module

    started(own_module.Own, tmp_path)
    sent = ray_methods.packed(["byol", "here"])
    assert list(sent) == ["here"]
    ray_methods.unpack(sent)
    assert METHODS["here"].load() is own_module.Own
    monkeypatch.delitem(sys.modules, "own_module")
    (tmp_path / "own_module.py").unlink()
    with pytest.raises(
        ConfigError, match=r"^method here: a worker cannot load it .No module named 'own_module'.; install"
    ):
        ray_methods.unpack(sent)


def test_the_example_has_the_papers_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from align_uniform import SPEC, AlignUniformConfig

    from tests.methods.small import context

    method = SPEC.load()(AlignUniformConfig(uniformity=0.5), 8)
    x, y = (nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(i))) for i in (1, 2))
    align = sum(((a - b) ** 2).sum() for a, b in zip(x, y, strict=True)) / 6

    def uniform(z):
        return torch.stack([(-2 * ((z[i] - z[j]) ** 2).sum()).exp() for i in range(6) for j in range(i)]).mean().log()

    out = method.loss([3 * x, 2 * y], None, context())
    torch.testing.assert_close(out.loss, align + 0.5 * (uniform(x) + uniform(y)) / 2)
