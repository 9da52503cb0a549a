"""Draw the data flow, docs/data_flow.svg: what a run and a sweep pass on, and which code does it.

    python scripts/docs_picture.py    # `make docs` does so

Standard library only. The picture has a ground of its own and follows the reader's light or dark setting.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).resolve().parent.parent / "docs" / "data_flow.svg"
WIDTH, HEIGHT = 940, 940
STYLE = """
  .ground { fill: #ffffff; stroke: #d0d7de; }
  .frame { fill: #f4f7fa; stroke: #8c99a8; stroke-dasharray: 6 4; }
  .box { fill: #e3edfb; stroke: #4a79b8; }
  .file { fill: #fdf0d8; stroke: #b98627; }
  .name, .title { font: 600 15px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #14202e; }
  .more { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #3c4a5a; }
  .code { font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #0b5a3c; }
  .arrow { stroke: #566373; stroke-width: 1.6; fill: none; marker-end: url(#head); }
  .head { fill: #566373; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #1b2028; stroke: #3b4452; }
    .frame { fill: #222935; stroke: #7d8998; }
    .box { fill: #24405f; stroke: #7fb0ea; }
    .file { fill: #4a3a17; stroke: #e0b45c; }
    .name, .title { fill: #f1f4f8; }
    .more { fill: #c5ced9; }
    .code { fill: #84e0b6; }
    .arrow { stroke: #a9b4c2; }
    .head { fill: #a9b4c2; }
  }
"""


@dataclass(frozen=True)
class Box:
    """A thing that is passed on: its left and upper edge, its size, its name, and what else is to be said about it."""

    x: int
    y: int
    name: str
    more: str = ""
    width: int = 200
    height: int = 56
    kind: str = "box"

    @property
    def middle(self) -> int:
        """The horizontal middle."""
        return self.x + self.width // 2

    @property
    def level(self) -> int:
        """The vertical middle."""
        return self.y + self.height // 2

    def drawn(self) -> list[str]:
        """The box and its words."""
        high = self.level + (-3 if self.more else 5)
        shape = (
            f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="7"/>'
        )
        lines = [shape, text("name", self.middle, high, self.name)]
        return lines + ([text("more", self.middle, high + 19, self.more)] if self.more else [])


def text(kind: str, x: int, y: int, words: str, anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def down(upper: Box, lower: Box, code: str, left: bool = False) -> list[str]:
    """An arrow between two boxes of which one is below the other, with the code that does it to its right or left."""
    path = f'<path class="arrow" d="M{upper.middle} {upper.y + upper.height} V{lower.y - 2}"/>'
    side, anchor = (-10, "end") if left else (10, "start")
    level = (upper.y + upper.height + lower.y) // 2 + 5
    return [path, text("code", upper.middle + side, level, code, anchor)]


def across(start: Box, end: Box, code: str, kind: str = "code") -> list[str]:
    """An arrow between two boxes side by side, with its label above."""
    right = end.x > start.x
    begin, stop = (start.x + start.width, end.x - 2) if right else (start.x, end.x + end.width + 2)
    path = f'<path class="arrow" d="M{begin} {start.level} H{stop}"/>'
    return [path, text(kind, (begin + stop) // 2, start.level - 8, code)]


def configurations() -> list[str]:
    """From what the user writes to what is run."""
    left, right = 120, 620
    recipe, sweep = Box(left, 40, "recipe + flags", kind="file"), Box(right, 40, "sweep file", kind="file")
    config, points = Box(left, 140, "Config"), Box(right, 140, "Sweep")
    resolved = Box(left, 240, "ResolvedConfig", "nothing is auto any more")
    trials = Box(right, 240, "SweepRun of Trials")
    lines = [line for box in (recipe, sweep, config, points, resolved, trials) for line in box.drawn()]
    lines += down(recipe, config, "config.cli.parse") + down(sweep, points, "config.sweep.parse")
    lines += across(points, config, "one Config per Point", "more")
    lines += down(config, resolved, "lifecycle.prepare") + down(points, trials, "sweeps.trial.trials_of")
    run = f'<path class="arrow" d="M{resolved.middle} {resolved.y + resolved.height} V348"/>'
    each = f'<path class="arrow" d="M{trials.middle} {trials.y + trials.height} V348"/>'
    lines += [run, text("code", resolved.middle + 10, 327, "lifecycle.Run.train", "start")]
    return [*lines, each, text("code", trials.middle + 10, 327, "ray_tune.run, run_trial", "start")]


def training() -> list[str]:
    """A step, as each worker takes it."""
    frame = '<rect class="frame" x="30" y="350" width="880" height="300" rx="10"/>'
    lines = [frame, text("title", 50, 378, "one Trainer per worker", "start")]
    lines += [text("code", 890, 378, "ray_train.fit, or LocalRuntime", "end")]
    images = Box(50, 410, "images", "in memory, or on disk")
    batch = Box(370, 410, "uint8 batch")
    views = Box(690, 410, "Views", "random crops, colours")
    inputs = Box(690, 550, "inputs", "views, rotated views, tiles")
    outputs = Box(370, 550, "features, logits", "encoder, projector, heads")
    loss = Box(50, 550, "loss", "method + weight x tasks")
    lines += [line for box in (images, batch, views, inputs, outputs, loss) for line in box.drawn()]
    lines += across(images, batch, "Loader") + across(batch, views, "Augment")
    lines += down(views, inputs, "Task.transform", left=True)
    lines += across(inputs, outputs, "Pretrainer") + across(outputs, loss, "Method.loss")
    turn = f'<path class="arrow" d="M{loss.middle} {loss.y} V{images.y + images.height + 2}"/>'
    return [*lines, turn, text("code", loss.middle + 10, 512, "Trainer.step, the next batch", "start")]


def results() -> list[str]:
    """What an epoch leaves, and what becomes of it."""
    checkpoint = Box(50, 740, "epoch_NNNNN/", "checkpoint.pt", kind="file")
    journal = Box(370, 740, "metrics.jsonl", "the journal", kind="file")
    encoder = Box(690, 740, "encoder.safetensors", kind="file")
    mlflow = Box(370, 850, "MLflow")
    report = Box(690, 850, "report", "report.html, report.json", kind="file")
    lines = [line for box in (checkpoint, journal, encoder, mlflow, report) for line in box.drawn()]
    for box in (checkpoint, journal, encoder):
        lines += [f'<path class="arrow" d="M{box.middle} 650 V{box.y - 2}"/>']
    lines += [text("more", checkpoint.middle + 10, 690, "end of an epoch:", "start")]
    lines += [text("code", checkpoint.middle + 10, 708, "EpochRecorder", "start")]
    lines += [text("code", journal.middle + 10, 708, "EpochRecorder, Evaluator", "start")]
    lines += [text("more", encoder.middle + 10, 708, "end of the run", "start")]
    lines += down(journal, mlflow, "Follower") + across(mlflow, report, "compare")
    back = f'<path class="arrow" d="M{checkpoint.x} {checkpoint.level} H16 V500 H28"/>'
    return [
        *lines,
        back,
        text("more", 50, 822, "the next start of the same", "start"),
        text("more", 50, 840, "command goes on from it", "start"),
    ]


def drawing() -> str:
    """The whole picture."""
    told = (
        "From a recipe or a sweep file to configurations, training steps, checkpoints, the journal, MLflow and reports"
    )
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>Data flow</title><desc>{told}</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">',
        '<path class="head" d="M0 0 L10 5 L0 10 z"/></marker></defs>',
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12"/>',
    ]
    return "\n".join([*head, *training(), *configurations(), *results(), "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(drawing())
