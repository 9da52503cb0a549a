"""The tables of gain.py: every run of every stage, beside plain's."""

import dataclasses
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from gain_pairs import Pairs, differences, mean_gains, runs_of
from gain_picture import draw
from gain_plan import METRICS, PLAIN, Content, Plan, Results, Row, Stage, last
from gain_stats import Difference, bootstrap, cost_to, kept, t_difference, with_plain_epochs
from gain_steps import CHEAP

INTRODUCTION = f"""# Does the rotation task gain at equal compute?

Command: `python benchmarks/gain.py report`; the plan is `benchmarks/gain_plan.yaml`, each run a file in `cells/`.

- step: seconds of a step over plain's. At equal compute a form has 1/step of plain's epochs, rounded; steps from
  1/{CHEAP:g} to {CHEAP:g} count as 1.
- gain: over plain, in points, mean over paired seeds (95% interval). *Seeds*: Student's t over the seeds. *Seeds and images*:
  percentiles of a bootstrap that draws seeds and measured images anew. For seeds it is too narrow, by sqrt(1 - 1 / seeds).
- p: one-sided, of no gain; not corrected for the number of rows.
- mean: over all methods of the table; seeds and images are drawn for all of them together.
- s to plain's kNN: training seconds until a run has the final kNN of plain's run with its seed, on lines between epochs, mean
  over the seeds (plain's own in brackets); "2 of 3" if not all reach it. What else the machine did is in these seconds, and not
  in the plain epochs beside them: those of the whole run, its epochs times step, shared out over its epochs by their FLOPs.
- "has 90% of the mean gain of": the ratio of the means over all methods, with the interval over seeds and images.
- A row with a failed run has no numbers.
"""
COSTS = "s to plain's kNN", "plain epochs to it"
COLUMNS = "| method | form | plain epochs | epochs | step | lr | seeds |"


def write(plan: Plan, results: Results) -> str:
    """Write README.md and the pictures; returns the text."""
    lines, named = [INTRODUCTION, *_summary(plan, results)], set[str]()
    for stage in plan.stages.values():
        each = itertools.product(stage.data, stage.methods)
        rows = [row for data, method in each for row in plan.rows(stage, data, method, results)]
        named |= {cell.name for row in rows for cell in row.cells}
        lines += _stage(stage, rows, results)
    lines += _steps(results)
    others = sorted({path.stem for path in results.cells.glob("*.json")} - named)
    if others:
        lines += ["", "## Runs of no stage", "", *(f"- {name}" for name in others)]
    text = "\n".join(lines) + "\n"
    results.folder.mkdir(parents=True, exist_ok=True)
    (results.folder / "README.md").write_text(text)
    return text


def _summary(plan: Plan, results: Results) -> list[str]:
    """All final stages in a table, with a row for each data set, method and seeds; then the defaults."""
    finals = [stage for stage in plan.stages.values() if stage.final]
    each = [(stage, data, method) for stage in finals for data in stage.data for method in stage.methods]
    found: dict[tuple[str, str, tuple[int, ...]], dict[str, Row]] = {}
    for stage, data, method in each:
        for row in plan.rows(stage, data, method, results):
            if row.cells and len(runs_of(row, results)) == len(row.cells):
                rows = found.setdefault((data + stage.part, method, tuple(stage.seeds)), {})
                if rows.setdefault(row.candidate.label, row).cells != row.cells:
                    raise SystemExit(f"{data} {method}: two final stages have {row.candidate.label}, with other epochs")
    labels = [PLAIN, *dict.fromkeys(label for rows in found.values() for label in rows if label != PLAIN)]
    if not found:
        return []
    heads = [f"{metric}: {label}" for metric in METRICS for label in labels]
    lines = [
        "",
        "## All finals",
        "",
        "On the test split. In brackets the gain over plain, with the interval that covers both of those below.",
    ]
    lines += ["", f"| data | method | seeds | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for (data, method, seeds), rows in found.items():
        shown = [_entry(rows.get(label), rows.get(PLAIN), key, results) for key in METRICS.values() for label in labels]
        lines.append(f"| {' | '.join([data, method, _listed(seeds), *shown])} |")
    for data in dict.fromkeys(key[0] for key in found):
        chosen = {}
        for label in reversed(plan.defaults):
            whole = [
                (m, seeds, rows) for (d, m, seeds), rows in found.items() if d == data and {label, PLAIN} <= rows.keys()
            ]
            chosen |= {method: (seeds, rows[label], rows[PLAIN]) for method, seeds, rows in whole}
        lines += _defaults(data, chosen, results) if chosen else []
    return lines


def _defaults(data: str, chosen: Mapping[str, tuple[Sequence[int], Row, Row]], results: Results) -> list[str]:
    """The default of each method beside plain, the mean over the methods, and a picture of their curves."""
    lines = ["", f"## The defaults, {data}", ""]
    lines += ["In brackets as above; of the means, seeds that differ between methods are taken in their order.", ""]
    heads = ["method", "form", "seeds", *(f"{metric}, {form}" for metric in METRICS for form in (PLAIN, "default"))]
    lines += [f"| {' | '.join([*heads, *COSTS])} |", "|---" * 9 + "|"]
    together: dict[str, list[Pairs]] = {}
    for method, (seeds, row, plain) in chosen.items():
        shown = [_entry(each, plain, key, results) for key in METRICS.values() for each in (plain, row)]
        costs = _costs(row, plain, results) if row.stage.curve != 0 else ["", ""]
        lines.append(f"| {' | '.join([method, row.candidate.label, _listed(seeds), *shown, *costs])} |")
        for metric, key in METRICS.items():
            together.setdefault(metric, []).append(Pairs(row, plain, key, results))
    if len(chosen) > 1 and len({len(pairs.ours) for pairs in together["kNN"]}) == 1:
        gains = [_gain(*differences(several)) for several in together.values()]
        lines.append(f"| mean of {len(chosen)} | | | | {gains[0]} | | {gains[1]} | | |")
    if all(row.stage.curve == 0 for _, row, _ in chosen.values()):
        return lines
    named = [
        dataclasses.replace(row, candidate=dataclasses.replace(row.candidate, label="default"))
        for _, row, _ in chosen.values()
    ]
    plains = [plain for _, _, plain in chosen.values()]
    picture = f"defaults_{re.sub('[^a-z0-9-]+', '_', data)}.png"
    draw([*itertools.chain(*zip(plains, named, strict=True))], results, results.folder / picture)
    return [*lines, "", f"![kNN against training seconds, mean over the seeds]({picture})"]


def _listed(seeds: Sequence[int]) -> str:
    """``201 to 204``, or each."""
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 2
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def _entry(row: Row | None, plain: Row | None, metric: str, results: Results) -> str:
    """Accuracy of a form, and its gain."""
    scores = [last(content).get(metric, math.nan) for content in runs_of(row, results)] if row is not None else []
    if not scores or any(map(math.isnan, scores)):
        return "failed" if scores else ""
    text = f"{100 * statistics.mean(scores):.1f}"
    pairs = None if row is None or plain is None or plain is row else Pairs(row, plain, metric, results)
    if pairs is None or pairs.gains is None:
        return text
    return f"{text} ({_gain(t_difference(pairs.ours, pairs.theirs), bootstrap(pairs.gains), 1)})"


def _gain(over_seeds: Difference, over_images: Difference | None, places: int = 2) -> str:
    """A gain, with the interval that covers both."""
    both = [over_seeds] if over_images is None else [over_seeds, over_images]
    ends = [end for one in both for end in (one.low, one.high) if end is not None]
    gain = round(100 * over_seeds.mean, places) + 0.0  # no minus before a zero
    return f"{gain:+.{places}f}: {100 * min(ends):+.{places}f} to {100 * max(ends):+.{places}f}"


def _stage(stage: Stage, rows: Sequence[Row], results: Results) -> list[str]:
    """The section of a stage."""
    contents = [content for row in rows for content in runs_of(row, results)]
    total = sum(max(len(row.cells), len(stage.seeds)) for row in rows)
    lines = ["", f"## {stage.name}", "", *([stage.question, ""] if stage.question else [])]
    lines += [f"{len(contents)} of {total} runs{' that are known to be needed' if stage.halving else ''}."]
    if not contents:
        return lines
    measured = "the test split" if stage.final else "images held out of the training split"
    sizes = Counter(f"{c['train_images']:,} training and {c['measured_images']:,} measured images" for c in contents)
    lines += [
        f"Measured on {measured}, at equal {stage.equal}. Seeds {', '.join(map(str, stage.seeds))}.",
        f"Images: {_counted(sizes)}.",
        f"Commits: {_counted(Counter(c['commit'] for c in contents))}.",
        f"Machines: {_counted(Counter(map(_machine, contents)))}.",
    ]
    failed = [f"{c['data']} {c['method']} {c['form']}, seed {c['seed']}: {c['error']}" for c in contents if c["error"]]
    lines += ["", *(f"- failed: {line}" for line in failed)] if failed else []
    for data in stage.data:
        own = [row for row in rows if row.candidate.data == data and runs_of(row, results)]
        if own and stage.halving:
            lines += _path(data, own, results)
        for metric in METRICS if own else ():
            lines += _table(stage, data, own, metric, results)
    if stage.final and stage.curve != 0:
        draw(rows, results, results.folder / f"{stage.name}.png")
        lines += ["", f"![kNN against training seconds, mean over the seeds]({stage.name}.png)"]
    return lines


def _table(stage: Stage, data: str, rows: Sequence[Row], metric: str, results: Results) -> list[str]:
    """All rows of a data set, then the means over the methods."""
    curve = metric == "kNN" and bool(stage.final if stage.curve is None else stage.curve)
    title = f"{COLUMNS} {metric}, % | gain (seeds) | p | gain (seeds and images) | p |"
    title += f" {' | '.join(COSTS)} |" if curve else ""
    lines = ["", f"### {data}: {metric}", "", title, "|---" * (title.count("|") - 1) + "|"]
    plains = {(r.candidate.method, r.candidate.label, r.budget): r for r in rows if r.candidate.form == PLAIN}
    together: dict[tuple[str, int], list[Pairs]] = {}
    for row in rows:
        candidate, contents = row.candidate, runs_of(row, results)
        plain = plains.get((candidate.method, candidate.reference, row.budget))
        scores = [last(content).get(METRICS[metric], math.nan) for content in contents]
        failed = any(map(math.isnan, scores))
        pairs = None if plain is None or plain is row or failed else Pairs(row, plain, METRICS[metric], results)
        seeds = f"{len(contents)}" + (f" of {len(row.cells)}" if len(contents) < len(row.cells) else "")
        lr = ", ".join(f"{value:g}" for value in sorted({content["lr"] for content in contents}))
        cells = [candidate.method, candidate.label, row.budget, row.cells[0].epochs]
        cells += [f"{row.ratio:.2f}" if row.ratio is not None else "", lr, seeds + (", failed" if failed else "")]
        cells += ["" if failed else f"{100 * statistics.mean(scores):.2f}", *_gains(pairs)]
        if curve:
            cells += _costs(row, plain, results) if plain is not None and not failed else ["", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        if pairs is not None and len(pairs.ours) == len(stage.seeds):
            together.setdefault((candidate.label, row.budget), []).append(pairs)
    for (label, budget), several in together.items():
        if len(several) == len(stage.methods) > 1:
            cells = [f"mean of {len(several)}", label, budget, "", "", "", len(stage.seeds), "", *_mean(several)]
            lines.append(f"| {' | '.join(map(str, cells + [''] * 2 * curve))} |")
    return lines + (_kept(stage, together) if stage.kept_of else [])


def _kept(stage: Stage, together: Mapping[tuple[str, int], Sequence[Pairs]]) -> list[str]:
    """Which share of the mean gain of the form ``kept_of`` the others have."""
    found = []
    for (label, budget), several in together.items():
        others = together.get((stage.kept_of, budget), ())
        if label == stage.kept_of or not len(several) == len(others) == len(stage.methods):
            continue
        ours, theirs = mean_gains(several), mean_gains(others)
        if ours is None or theirs is None or math.isnan((share := kept(ours, theirs)).mean):
            continue
        interval = "no interval: that gain may be 0"
        if share.low is not None and share.high is not None:
            interval = f"{100 * share.low:.0f}% to {100 * share.high:.0f}%"
        found.append(f"`{label}` has {100 * share.mean:.0f}% of the mean gain of `{stage.kept_of}` ({interval}).")
    return ["", *found] if found else []


def _gains(pairs: Pairs | None) -> list[str]:
    """Gain and p over seeds, and over seeds and images."""
    if pairs is None or not pairs.ours:
        return [""] * 4
    found = _shown(t_difference(pairs.ours, pairs.theirs))
    return found + (["", ""] if pairs.gains is None else _shown(bootstrap(pairs.gains)))


def _mean(several: Sequence[Pairs]) -> list[str]:
    """The same of the mean over the methods."""
    over_seeds, over_images = differences(several)
    return _shown(over_seeds) + (["", ""] if over_images is None else _shown(over_images))


def _shown(difference: Difference) -> list[str]:
    if difference.low is None or difference.high is None or difference.p is None:
        return [f"{100 * difference.mean:+.2f}", ""]
    interval = f"({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
    mean = round(100 * difference.mean, 6)  # so that equal means round alike
    return [f"{mean:+.2f} {interval}", f"{difference.p:.4f}"]


def _costs(row: Row, plain: Row, results: Results) -> list[str]:
    """Seconds, and plain epochs, to plain's final kNN, beside plain's own."""
    theirs, metric = {c["seed"]: c for c in runs_of(plain, results)}, METRICS["kNN"]
    pairs = [(c, theirs[c["seed"]]) for c in runs_of(row, results) if c["seed"] in theirs]
    pairs = [pair for pair in pairs if metric in last(pair[1])]
    found = []
    for cost, places in (("cost/train_seconds", 0), ("cost/plain_epochs", 1)):
        taken: list[list[float]] = [[], []]
        for pair in pairs:
            for side, ratio in enumerate((row.ratio or math.nan, 1.0)):
                points = with_plain_epochs(pair[side]["points"], ratio)
                value = cost_to(points, last(pair[1])[metric], metric, cost)
                taken[side] += [] if value is None else [value]
        ours, own = (f"{statistics.mean(side):.{places}f}" if side else "" for side in taken)
        whole = pairs and len(taken[0]) == len(pairs)
        found.append(f"{ours} ({own})" if whole else f"{len(taken[0])} of {len(pairs)}" if pairs else "")
    return found


def _path(data: str, rows: Sequence[Row], results: Results) -> list[str]:
    """Who went on to which budget, with the score that decided."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    lines = [
        "",
        f"### {data}: the halving",
        "",
        "Mean of kNN and linear, %, after so many plain epochs or their equal.",
        "",
    ]
    lines += [f"| method | form | {' | '.join(map(str, budgets))} |", "|---" * (2 + len(budgets)) + "|"]
    scores: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        key = row.candidate.method, row.candidate.label
        whole = len(runs_of(row, results)) == len(row.cells)
        score = results.score(row) if whole else math.nan
        scores.setdefault(key, {})[row.budget] = (
            f"{100 * score:.2f}" if math.isfinite(score) else "failed" if whole else "..."
        )
    for key, each in scores.items():
        lines.append(f"| {' | '.join([*key, *(each.get(budget, '') for budget in budgets)])} |")
    return lines


def _steps(results: Results) -> list[str]:
    """The measured steps."""
    if not results.steps.entries:
        return []
    lines = ["", "## Seconds of a step over plain's", ""]
    lines += ["Medians of paired ratios at positions in the run: their mean, lowest and highest.", ""]
    lines += [
        "| data | method | form | step | lowest | highest | plain, s | date | commit | machine |",
        "|---" * 10 + "|",
    ]
    for e in sorted(results.steps.entries, key=lambda e: (e["data"], e["method"], e["form"])):
        numbers = [f"{e[name]:.3f}" for name in ("ratio", "lowest", "highest", "plain_seconds")]
        row = [e["data"], e["method"], e["form"], *numbers, e["date"], e["commit"], _machine(e)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _machine(content: Content) -> str:
    return f"{content['machine']}, {content['precision']}"


def _counted(found: Counter[str]) -> str:
    """``a`` or ``a (3 runs), b (1)``."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{name} ({count} runs)" for name, count in found.most_common())
