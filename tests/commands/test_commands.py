"""How a command ends."""

import logging

import pytest

from rotssl.commands import run_command
from rotssl.config.fields import ConfigError


def test_errors_are_one_line_and_a_code(capsys):
    def body(error):
        raise error

    for error, code, shown in ((ConfigError("a: got 1,\n not 2"), 2, "1, not 2"), (KeyboardInterrupt(), 130, "")):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda error=error: body(error))
        written = capsys.readouterr()
        assert ended.value.code == code
        assert (written.out, written.err.count("\n")) == ("", 1)
        assert shown in written.err


def test_a_warning_of_ours_is_a_line_that_says_so(capsys):
    for _ in range(2):  # the second command does not print it twice
        with pytest.raises(SystemExit):
            run_command(lambda: logging.getLogger("rotssl.lifecycle").warning("the disk is full") or 0)
        assert capsys.readouterr().err == "warning: the disk is full\n"
