"""Methods that a program registered by a call, on their way to Ray's workers, which are other processes."""

import dataclasses
import pickle
from collections.abc import Iterable, Mapping

from rotssl.base.errors import in_a_line
from rotssl.config.fields import ConfigError
from rotssl.config.methods import METHODS
from rotssl.runtimes.ray_cluster import import_ray


def packed(names: Iterable[str]) -> dict[str, bytes]:
    """What ``unpack`` takes: name -> method, of those among the names that only this process knows.

    Classes of a notebook or of the started script travel by value, others by the name of their module.

    Raises:
        ConfigError: a method cannot be sent.
    """
    own = {name: METHODS[name] for name in dict.fromkeys(names) if name in METHODS.added}
    if not own:
        return {}
    import_ray()
    from ray import cloudpickle

    from rotssl.methods import outside  # which imports torch

    sent = {}
    for name, spec in own.items():
        if isinstance(spec.target, str) and spec.target.startswith("__main__:"):
            spec = dataclasses.replace(spec, target=outside.load(name))  # the workers' own __main__ is another
        try:
            sent[name] = cloudpickle.dumps(spec)
        except Exception as error:  # of any kind: it has code that is not ours
            raise ConfigError(f"method {name}: it cannot be sent to the workers ({in_a_line(error)})") from error
    return sent


def unpack(sent: Mapping[str, bytes]) -> None:
    """Register in this process what ``packed`` returned in another.

    Raises:
        ConfigError: a module of it cannot be imported here.
    """
    for name, spec in sent.items():
        try:
            METHODS.register(name, pickle.loads(spec))  # noqa: S301 - from the driver, as the worker's whole task
        except ConfigError:
            raise
        except Exception as error:  # of any kind: importing runs code that is not ours
            raise ConfigError(
                f"method {name}: a worker cannot load it ({in_a_line(error)}); install its package on all nodes, "
                "or define it in the notebook or script itself"
            ) from error
