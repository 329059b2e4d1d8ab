"""Estimate the best teacher for a student from the records of distill runs, with uncertainty.

    python tools/fit_law.py --records runs/*/record.json --out law
    python tools/fit_law.py --records sweep/records.jsonl --where init=pruned --out law \\
        --student-params 3B --tokens 126B

writes OUT/law.json (the same records give the same bytes), report.md, report.html (the report as one page), curse.png,
optimum.png, law.png and compute.png; also causes.png if the same starts were trained on labels alone, and price.png
with --student-params. If the records contain runs on labels alone with several numbers of tokens, the report also says
whether training on labels alone would be better for the same FLOPs.

    python tools/fit_law.py --records sweep/records.jsonl --where init=pruned --out law --next 1e18 --grid grid.yaml

proposes the cells to run next within 1e18 FLOPs. The gain of a run is the expected decrease of the recommendation's
expected regret: the run's loss is simulated from the posterior (draws of the model's scales and of the losses), and the
teacher recommended before it is compared with the one recommended after it. Cells are students of the records under
teachers of the records, the grid and the catalogue, with another seed or another training of the teacher, whose FLOPs
are counted once. They are listed in descending order of gain per FLOP. With --grid, the grid that the records come
from, the cells are written to OUT/next.yaml, a grid for tools/make_sweep.py; pass its records to --records together
with the old ones.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices of about 100 rows: too small for threads

from megatron_capgap.common.errors import UserError, not_installed
from megatron_capgap.common.fileio import write_atomically
from tools.catalogue import parameters, read_catalogue, read_models, read_yaml
from tools.command import run_tool

try:
    from megatron_capgap.law import analysis, cost, html_page, next_runs, plot, records, report
    from megatron_capgap.law.advice import Advice, advise, beside_labels
    from megatron_capgap.law.formatting import short
    from megatron_capgap.law.next_grid import next_grid
    from megatron_capgap.law.sweep import expand
    from megatron_capgap.law.verdict import span
except ImportError as missing:
    print(f"fit_law: error: {not_installed(str(missing.name).partition('.')[0], 'plot')}", file=sys.stderr)
    sys.exit(2)

WANDB = """
runs of Weights & Biases: `Export as CSV` of the table of runs, with a column per setting and metric, or in Python

    runs = wandb.Api().runs("ENTITY/PROJECT")
    told = [{"config": run.config, "summary": dict(run.summary)} for run in runs]
    json.dump(told, open("runs.json", "w"), default=str)

    python tools/fit_law.py --records runs.json --out law \\
        --rename 'config.*=*' summary.eval/loss=valid_loss config.model.size=student_params

Nested values have dotted names; PREFIX.*=* maps all fields of a record that have their own name below PREFIX.
"""
CATALOGUE = Path(__file__).resolve().with_name("catalogue.yaml")
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 with one line on stderr for invalid input; 130 after Ctrl-C."""
    args = parse_arguments(argv)

    def work() -> int:
        try:
            fit_law(args)
        except BrokenPipeError:  # the reader closed the pipe; all files are written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    return run_tool("fit_law", work, place=str(args.out))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fit_law",
        description=__doc__,
        epilog=f"fields of a record, those in brackets may be missing:\n{records.schema()}\n{WANDB}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--records",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl, .json, .csv or .tsv files, or runs' record.json",
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        type=condition,
        metavar="NAME=FIELD",
        help="read a column or key NAME as the FIELD of a record (dotted names for nested values: "
        "summary.loss=valid_loss); fields, and an example for Weights & Biases, are listed below",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        type=condition,
        metavar="NAME=VALUE",
        help=f"keep the records with these values; names: {', '.join(records.CONDITIONS)}",
    )
    parser.add_argument(
        "--count",
        choices=records.COUNTS,
        default=records.COUNTS[0],
        help="parameters to count in the records, --student-params and the catalogue (non-embedding)",
    )
    add_questions(parser)
    args = parser.parse_args(argv)
    if (args.grid or args.teacher_tokens) and not args.next:
        parser.error("--grid and --teacher-tokens: only valid with --next; give it as well")
    if args.tokens and not args.student_params:
        parser.error("--tokens: only valid with --student-params; give both")
    return args


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Adds the options for a recommendation, a comparison of models, and a plan."""
    parser.add_argument("--student-params", type=number, metavar="N", help="recommend a teacher for this student: 3B")
    parser.add_argument(
        "--catalogue", type=Path, default=CATALOGUE, metavar="FILE", help="YAML file of available teachers"
    )
    parser.add_argument(
        "--tokens",
        type=number,
        metavar="N",
        help="distillation tokens of the student, for its cost (default: those of the runs)",
    )
    parser.add_argument("--mfu", type=share, default=cost.MFU, help=f"share of the GPU's peak reached ({cost.MFU})")
    parser.add_argument(
        "--gpu-peak", type=number, default=cost.GPU_PEAK, metavar="FLOPS", help="peak FLOP/s (312T, A100)"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare how well several models predict unseen students and teachers (up to a minute)",
    )
    parser.add_argument(
        "--next",
        type=number,
        metavar="FLOPS",
        help="propose the cells to run next within this many FLOPs, those that improve the recommendation (for "
        "--student-params; without it, for every student of the records) most per FLOP (up to a minute)",
    )
    parser.add_argument("--grid", type=Path, metavar="GRID.yaml", help="grid of the sweep that the records come from")
    parser.add_argument(
        "--teacher-tokens", type=number, metavar="N", help="training tokens of a new teacher (default: the records')"
    )


def number(value: str) -> float:
    """Parses a number such as 3B, 126e9 or 1234."""
    scale = SUFFIXES.get(value[-1:], 1.0)
    try:
        size = float(value[:-1] if value[-1:] in SUFFIXES else value) * scale
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0, like 3B or 1234")
    return size


def share(value: str) -> float:
    if not 0 < (size := number(value)) <= 1:
        raise argparse.ArgumentTypeError(f"{value} must be above 0 and at most 1")
    return size


def condition(value: str) -> tuple[str, str]:
    name, equals, wanted = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value} is not NAME=VALUE, like init=pruned")
    return name, wanted


def fit_law(args: argparse.Namespace) -> None:
    """Reads records, fits, writes the outputs, and prints a summary.

    Raises:
        LawError, UserError: invalid input; raised before anything is written.
    """
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")
    places = records.located(args.records, dict(args.rename))
    everything = list(places)
    if twice := [name for name, _ in args.where if [given for given, _ in args.where].count(name) > 1]:
        raise UserError(f"--where {twice[0]}: given twice; give one value")
    found = analysis.analyse(records.select(everything, dict(args.where)), args.count, everything, places)
    advice = None
    if args.student_params:
        teachers, init = read_catalogue(args.catalogue, args.count), found.records[0].init
        tokens = args.tokens or found.records[0].tokens
        advice = advise(found.process, args.student_params, teachers, tokens, init)
        advice = beside_labels(advice, found.records, everything, args.count, tokens)
    scores = analysis.compared(found) if args.compare else []
    proposed, grid = propose(args, found, advice) if args.next else (None, None)
    args.out.mkdir(parents=True, exist_ok=True)
    plot.curse(found, args.out / "curse.png")
    plot.optimum(found, args.out / "optimum.png")
    plot.law(found, args.out / "law.png", advice)
    plot.compute(found, args.out / "compute.png")
    (args.out / "price.png").unlink(missing_ok=True)
    if advice is not None and advice.refusal is None:
        plot.price(advice, args.out / "price.png")
    (args.out / "causes.png").unlink(missing_ok=True)
    if found.causes:
        plot.causes(found, args.out / "causes.png")
    text = report.write(found, advice, scores, args.mfu, args.gpu_peak, proposed)
    write_atomically(args.out / "report.md", text)
    write_atomically(args.out / "report.html", html_page.page(text, args.out))
    write_atomically(args.out / "law.json", analysis.as_json(found, advice, scores, proposed))
    (args.out / "next.yaml").unlink(missing_ok=True)
    if grid is not None:
        write_atomically(args.out / "next.yaml", grid)
    if advice is not None:
        recommend(advice)
    print(report.headline(found))
    for remark in found.remarks:
        print(f"note: {remark}")
    pictures = "curse.png, optimum.png, law.png, compute.png" + ", causes.png" * bool(found.causes)
    pictures += ", price.png" * bool(advice and advice.refusal is None)
    if proposed is not None:
        print(report.plan_table(proposed))
        pictures += ", next.yaml" * bool(grid)
    print(f"wrote {args.out}/law.json, report.md, report.html, {pictures}")


def recommend(advice: Advice) -> None:
    """Prints the recommendation, or the reason why there is none, and the warnings."""
    if advice.refusal is not None:
        print(f"no recommendation: {advice.refusal}")
        return
    print(report.at_equal_flops(advice))
    for text in advice.warnings:
        print(f"warning: {text}")
    first = advice.candidates[0]
    low, high = first.interval
    print(
        f"teacher for {short(advice.student)}: {first.name}, {short(first.teacher)}   expected regret "
        f"{first.regret:.4f} nats a token ({low:.4f} to {high:.4f}) among {len(advice.candidates)} of the catalogue"
    )
    if advice.best is not None and advice.interval is not None and advice.within is not None:
        within, interval = (" to ".join(map(short, ends)) for ends in (advice.within, advice.interval))
        print(f"the best teacher within {within}, of which these runs tell: {short(advice.best)} ({interval})")


def propose(
    args: argparse.Namespace, found: analysis.Analysis, advice: Advice | None
) -> tuple[next_runs.NextRunsPlan, str | None]:
    """The plan for --next, and with --grid the grid of its cells.

    Raises:
        UserError, LawError: nothing can be planned, or the grid is not that of the records.
    """
    if not found.records[0].taught:
        raise UserError("--next: these runs had no teacher; select distillation runs with --where taught=true")
    if advice is not None and advice.refusal is not None:
        raise UserError(f"--next: {advice.refusal}; leave out --student-params, or add runs near that student")
    counted, total = (read_catalogue(args.catalogue, count) for count in (args.count, "total"))
    models = read_models(args.catalogue)
    further = [next_runs.TeacherCandidate(name, size, total[name]) for name, size in counted.items()]
    if args.grid:
        grid = read_yaml("--grid", args.grid)
        expand(grid)
        models |= {f"grid/{name}": each["model"] for name, each in _teachers_of(grid).items() if "model" in each}
        named = {name: model for name, model in models.items() if name.startswith("grid/")}
        sizes = {name: [parameters(model, count) for count in (args.count, "total")] for name, model in named.items()}
        further = [*(next_runs.TeacherCandidate(name, *both) for name, both in sizes.items()), *further]
    targets = {}
    students = [advice.student] if advice is not None else found.process.cells.students()
    for student in students:
        within = span(found.process, student)
        ends = student * np.exp(within[[0, -1]]) * [1 - 1e-9, 1 + 1e-9]
        had = [size for size in counted.values() if ends[0] <= size <= ends[1]]
        had = had or sorted({each.size for each in found.trainings if ends[0] <= each.size <= ends[1]})
        if len(had) > 1:
            targets[student] = had
    if not targets:
        raise UserError("--next: no student has two teachers to choose among; give a --catalogue that has them")
    proposed = next_runs.propose_runs(
        found.process, found.records, args.count, targets, further, args.next, args.teacher_tokens
    )
    if not args.grid or not proposed.steps:
        return proposed, None
    cells = next_grid(proposed, grid, found.records[0].init, lambda model: parameters(model, args.count), models)
    head = "".join(f"# {line}\n" for line in report.plan_table(proposed).splitlines())
    return proposed, head + yaml.safe_dump(
        json.loads(json.dumps(cells)), sort_keys=False, width=110, default_flow_style=None
    )


def _teachers_of(grid: Any) -> Mapping[str, Any]:
    teachers = grid.get("teachers") if isinstance(grid, Mapping) else None
    return teachers if isinstance(teachers, Mapping) else {}


if __name__ == "__main__":
    sys.exit(main())
