"""What values a field takes."""

import ast
import math

import pytest

from rotssl import config as cfg
from rotssl.config.fields import ConfigError

NUMBERS = [key for key, (hint, _) in cfg.schema().items() if {int, float} & {hint, *getattr(hint, "__args__", ())}]
NO_NUMBERS = ["nan", "inf", "-1", "x", "", math.nan, math.inf, -math.inf, 10**400, -1, True, [], {}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:9])
def test_no_number_takes_what_is_not_finite_or_out_of_range(value):
    for key in NUMBERS:
        with pytest.raises(ConfigError, match=rf"^{key}: got .*, expected"):
            cfg.build({key: value})


GOOD_VALUES = """
train.epochs | '3' | 3
optim.lr | '5e-4' | 5e-4
train.stop_after | 'null' | None
data.root | 'null' | None
tracking.run_name | 'null' | None
train.seed | '9007199254740993' | 9007199254740993
train.deterministic | 'true' | True
scaling.use_gpu | 'false' | False
views.blur | '1, 0.1' | (1.0, 0.1)
views.blur | [1, 0.1] | (1.0, 0.1)
views.jitter | '(0.1,0.2,0.3,0.1)' | (0.1, 0.2, 0.3, 0.1)
"""


@pytest.mark.parametrize("line", GOOD_VALUES.strip().splitlines())
def test_values_become_what_the_field_holds(line):
    key, value, expected = line.split(" | ")
    section, leaf = key.split(".")
    got = getattr(getattr(cfg.build({key: ast.literal_eval(value)}), section), leaf)
    assert got == ast.literal_eval(expected)
    assert type(got) is type(ast.literal_eval(expected))
