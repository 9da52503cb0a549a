"""Methods from other packages: which are found, and what is said of those that cannot be used."""

import dataclasses
import sys
from dataclasses import dataclass

import pytest

from rotssl import config as cfg
from rotssl.config import cli
from rotssl.config.fields import ConfigError, opt
from rotssl.config.methods import METHODS, MethodConfig, MethodSpec, register_method
from tests.own_methods import forgotten, installed

PACKAGE = """
from dataclasses import dataclass
from rotssl import MethodConfig, MethodSpec, opt

@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    name: str = opt("own", "Pretraining method.")
    strength: float = opt(2.0, "How much.", gt=0)

SPEC = MethodSpec(Config, "own_code:Own", optimizer="sgd", lr=0.3)
NUMBER = 3
"""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    name: str = opt("here", "Pretraining method.")
    strength: float = opt(2.0, "How much.", gt=0)


SPEC = MethodSpec(Config, "nowhere:Here", "sgd", 0.1)


@pytest.fixture(autouse=True)
def fresh():
    with forgotten():
        yield


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a module and packages with entry points on the path."""
    (tmp_path / "own_spec.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_spec", raising=False)

    def make(name="own-package", **points):
        monkeypatch.syspath_prepend(installed(tmp_path / name, name, **points))

    return make


def test_an_entry_point_is_a_method_as_the_others_are(package):
    package(own="own_spec:SPEC")
    config = cfg.build({"method.name": "own", "method.strength": "3"})
    assert config.method.strength == 3 and "own" in list(METHODS) and len(METHODS) == len(list(METHODS))
    assert METHODS.sources["own"] == "own-package 1.0 (own_spec:SPEC)"
    assert cfg.resolve(config, 32, 512).optim.lr == 0.3
    with pytest.raises(ConfigError, match=r"^method\.strength: got -1, expected a number greater than 0$"):
        cfg.build({"method.name": "own", "method.strength": -1})
    assert "--method.strength" in cli.parser("own", "", "", "").format_help()
    with pytest.raises(ConfigError, match="it is a field of own, not of byol"):
        cfg.build({"method.strength": 3})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere:SPEC", r"nowhere:SPEC cannot be loaded \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("own_spec:LOST", "own_spec:LOST cannot be loaded .*has no attribute 'LOST'"),
        ("own_spec:NUMBER", "got 3, expected a MethodSpec"),
        ("own_spec:Config", "got the class Config, expected a MethodSpec"),
    ],
)
def test_a_broken_entry_point_is_one_line_for_whoever_asks_for_it_and_nothing_for_others(package, value, words):
    package(own=value)
    for ask in (cfg.build, lambda given: cli.parse([f"--method.name={given['method.name']}"])):
        with pytest.raises(ConfigError, match=f"^rotssl.methods: the entry point own of own-package 1.0: {words}"):
            ask({"method.name": "own"})
    assert "own" not in list(METHODS)
    assert cli.parse([]).config.method.name == "byol"


def test_a_name_that_is_taken_is_refused(package, caplog):
    package(byol="own_spec:SPEC", own="own_spec:SPEC")
    package("another", own="own_spec:SPEC")
    assert "byol" in list(METHODS) and cli.parse([]).config.method.name == "byol"
    assert "the entry point byol of own-package 1.0 is left out: rotssl has its own byol; rename it" in caplog.text
    twice = "^rotssl.methods: the entry point own of another 1.0 and of own-package 1.0: one name cannot stand for both"
    with pytest.raises(ConfigError, match=twice):
        cfg.build({"method.name": "own"})
    for name, owner in (("own", "another package"), ("simclr", "rotssl itself")):
        with pytest.raises(ConfigError, match=f"^{name}: the name is taken by {owner}; choose another$"):
            register_method(name, SPEC)


def test_a_registered_method_can_be_registered_again(package):
    package(own="own_spec:SPEC")
    register_method("here", SPEC)
    assert cfg.build({"method.name": "here"}).method.strength == 2

    @dataclass(frozen=True, kw_only=True)
    class Other(Config):
        strength: float = opt(5.0, "How much.", gt=0)

    register_method("here", dataclasses.replace(SPEC, config=Other))
    assert cfg.build({"method.name": "here"}).method.strength == 5
    with pytest.raises(ConfigError, match=r"^own: the name is taken by own-package 1.0 \(own_spec:SPEC\); choose"):
        register_method("own", SPEC)


@dataclass(frozen=True, kw_only=True)
class Plain(MethodConfig):
    name: str = opt("here", "Pretraining method.")
    strength: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Odd(MethodConfig):
    name: str = opt("here", "Pretraining method.")
    strength: dict = opt(None, "How much.")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Here", {}, "got the name 'Here', expected lower-case letters"),
        ("there", {}, "config: its field name is 'here' by default, expected 'there'"),
        ("here", {"config": dict}, "config: got the class dict, expected a dataclass that is a subclass"),
        ("here", {"config": Plain}, "config: the field strength is not made by rotssl.opt"),
        ("here", {"config": Odd}, "config: the field strength has the type <class 'dict'>, expected bool, int"),
        ("here", {"target": "nowhere"}, "target: got 'nowhere', expected module:class"),
        ("here", {"target": 3}, "target: got 3, expected module:class, or the class itself"),
        ("here", {"optimizer": "adam"}, "optimizer: got 'adam', expected one of sgd, lars, adamw"),
        ("here", {"lr": 0}, "lr: got 0, expected a number greater than 0"),
    ],
)
def test_what_a_spec_must_be(name, changes, words):
    with pytest.raises(ConfigError, match=f"^{name}: {words}"):
        register_method(name, dataclasses.replace(SPEC, **changes))
