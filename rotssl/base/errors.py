"""Errors: of locks, and in words."""


class Held(Exception):
    """Another process holds the lock."""


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ") or type(error).__name__


def last_line(error: BaseException) -> str:
    """The type of an error and the last line of what it says, which of a traceback is the error itself."""
    name, lines = type(error).__name__, [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last if last.startswith(f"{name}:") else f"{name}: {last}"
