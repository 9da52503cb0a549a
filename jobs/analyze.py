"""The paper's analysis of why self-supervised methods learn slowly, with runs of one's own (docs/analysis.md).

sweep: the runs of an experiment beside a table or figure of the paper. gradients: signal and noise of each loss's gradient over a
run. overlap: how far the two crops of an image overlap, and how much of its saliency they show. The flags of each are listed by
--help after its name.
"""

import sys

from rotssl.commands import analyze, folder_of, run_command
from rotssl.commands.compare import METRICS
from rotssl.config.cli import Parser
from rotssl.reports.paper import STUDIES
from rotssl.tracking.store import asked_uri


def main() -> int:
    """Analyse and print; returns the exit code."""
    if sys.argv[1:2] == ["overlap"]:  # which has the flags of jobs/pretrain.py
        return analyze.overlap(sys.argv[2:], __doc__)
    parser = Parser(prog="jobs/analyze.py", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help="sweep, gradients or overlap")
    sweep = kinds.add_parser("sweep", allow_abbrev=False, help="the runs of a sweep beside the paper's")
    sweep.add_argument("--experiment", metavar="NAME", required=True, help="MLflow experiment")
    sweep.add_argument("--study", choices=STUDIES, required=True, help="table or figure of the paper")
    sweep.add_argument("--metric", choices=METRICS, default="linear/top1", help="[default: linear/top1]")
    sweep.add_argument("--sweep", metavar="NAME", help="only the trials of this sweep (name or run id)")
    text = "default: MLFLOW_TRACKING_URI, else mlflow.db in ./results (~/rotssl-results in a Ray job)"
    sweep.add_argument("--uri", metavar="URI", help=f"URI of the tracking store; {text}")
    sweep.add_argument("--output", metavar="DIR", help="folder for the files [default: analysis-NAME]")
    signal = kinds.add_parser("gradients", allow_abbrev=False, help="signal and noise of gradients over a run")
    signal.add_argument("--checkpoint", metavar="DIR", required=True, help="folder of the run")
    signal.add_argument("--batches", type=int, default=16, metavar="N", help="at each checkpoint [default: 16]")
    signal.add_argument("--data.root", metavar="DIR", dest="root", help="folder of the images, if they were moved")
    signal.add_argument("--output", metavar="DIR", help="folder for the files [default: signal in the run's folder]")
    kinds.add_parser("overlap", help="how far the two crops of an image overlap: flags of jobs/pretrain.py")
    given = parser.parse_args()
    if given.kind == "gradients":
        return analyze.gradients(given.checkpoint, given.batches, given.root, given.output)
    output = folder_of("--output", given.output or f"analysis-{given.experiment}").absolute()
    return analyze.sweep(asked_uri(given.uri), given.experiment, given.study, given.metric, output, given.sweep)


if __name__ == "__main__":
    run_command(main)
