"""What the programs in jobs/ do, one module each."""

import sys
from collections.abc import Callable
from typing import NoReturn

from rotssl.config.fields import ConfigError

EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130


def say(line: str) -> None:
    """Print a line that is not part of the result: to stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def run_command(body: Callable[[], int]) -> NoReturn:
    """Exit with the body's code; a ConfigError is one line to stderr and code 2, an interrupt 130."""
    try:
        code = body()
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
