"""Signs of life from loops that may take long without a step: evaluation, decoding.

Whoever runs such a loop calls ``beat``; whoever wants to hear it listens. Without a listener a beat costs a comparison.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_tell: Callable[[], None] = lambda: None  # noqa: E731
_every, _next = 0.0, math.inf


def beat() -> None:
    """Tell the listener, if there is one, that this process is alive; at most once per its interval."""
    global _next
    now = time.monotonic()
    if now >= _next:
        _next = now + _every
        _tell()


@contextmanager
def listener(tell: Callable[[], None], every: float) -> Iterator[None]:
    """Call ``tell`` on beats within the body, at most once in ``every`` seconds, from the thread that beats."""
    global _tell, _every, _next
    _tell, _every, _next = tell, every, 0.0
    try:
        yield
    finally:
        _tell, _next = lambda: None, math.inf
