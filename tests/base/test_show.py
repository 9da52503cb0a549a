"""Progress in a terminal, a log and a notebook."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from rotssl.base import show
from rotssl.engine.events import EpochDone, StepDone
from rotssl.reports.progress import ProgressView

POINT = {"loss/total": 1.5, "loss/ssl": 1.25, "throughput/images_per_second": 99.6, "knn/top1": 0.5}


@pytest.fixture
def shown(monkeypatch):
    """A notebook, as far as anybody can tell: what its cell was given to display, in order."""
    seen = []

    class Handle:
        def update(self, what):
            seen.append(what if isinstance(what, str) else what._repr_html_())

    def display(what, display_id):
        seen.append(what._repr_html_())
        return Handle()

    module = SimpleNamespace(display=display, HTML=lambda text: text)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr(show, "in_notebook", lambda: True)
    return seen


def test_a_notebook_gets_lines_of_text_and_a_bar_that_vanishes(shown, capsys):
    with ProgressView(2, "a <run>") as view:
        view.bar.clock = iter(range(100)).__next__
        view.handle(StepDone(1, 1, 8))
        view.handle(EpochDone(1, 4, 8, POINT))
    written = capsys.readouterr()
    assert written.out.startswith("epoch 1/2  loss 1.500  ssl 1.250  kNN 50.0%  100 images/s") and written.err == ""
    assert written.out.count("\n") == 1
    assert "a &lt;run&gt;: starting workers <progress></progress>" in shown[0]
    assert '<progress value="4" max="8"></progress> 4/8 steps' in shown[-2] and shown[-1] == ""
    assert show.stream() is sys.stdout


def test_a_notebooks_bar_is_drawn_at_most_five_times_a_second(shown):
    bar = show.NotebookBar("steps", clock=iter(i / 100 for i in range(1000)).__next__)
    bar.start()
    task = bar.add_task("run", total=100)
    for _ in range(100):
        bar.advance(task, 1)
    assert 4 <= len(shown) - 1 <= 6 and repr(bar) == "run 100/100 steps"
    bar.stop()
    bar.stop()
    assert shown[-1] == ""


def test_a_log_gets_no_bar(capsys):
    assert not show.in_notebook() and show.stream() is sys.stderr
    bar = show.bar(Console(file=io.StringIO()), "steps")
    assert bar.disable
