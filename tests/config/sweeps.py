"""Sweeps from the text of a file, for the tests."""

from rotssl.commands.ablate import trials_of
from rotssl.config.sweep import parse

SMALL = "data: {name: synthetic}\n"


def reader(tmp_path, monkeypatch):
    """A function from the content of a file and flags to the sweep; the working directory is an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def read(content, *flags):
        (tmp_path / "some.yaml").write_text(content)
        return parse(["--config", str(tmp_path / "some.yaml"), *flags], "jobs/ablate.py", "").sweep

    return read


def names_in(sweep):
    """A function from the content of a file and flags to the names of the trials."""
    return lambda content, *flags: [trial.name for trial in trials_of(sweep(SMALL + content, *flags))]
