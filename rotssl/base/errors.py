"""Errors in words."""


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ") or type(error).__name__
