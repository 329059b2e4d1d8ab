"""Say which teacher is best for a student, from the records of distill runs, and how sure that is.

    python tools/fit_law.py --records runs/*/record.json --out law
    python tools/fit_law.py --records sweep/records.jsonl --where init=pruned --out law \\
        --student-params 3B --tokens 126B

writes OUT/law.json (the same records give the same bytes), report.md, the same as one page, report.html, and curse.png,
optimum.png, law.png and compute.png; and causes.png where the same starts were trained on labels alone.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices of a hundred rows: threads would only wait for each other

from megatron_capgap.common.errors import UserError, not_installed
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.law.records import LawError

try:
    from megatron_capgap.law import analysis, cost, html_page, plot, records, report
    from megatron_capgap.law.advice import Advice, advise
    from megatron_capgap.law.formatting import short
except ImportError as missing:
    print(f"fit_law: error: {not_installed(str(missing.name).partition('.')[0], 'plot')}", file=sys.stderr)
    sys.exit(2)

CATALOGUE = Path(__file__).resolve().with_name("catalogue.yaml")
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 with one line on stderr where the input is at fault."""
    args = parse_arguments(argv)
    try:
        fit_law(args)
    except (UserError, LawError) as error:
        print(f"fit_law: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of what is printed has seen enough; everything is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"fit_law: error: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fit_law",
        description=__doc__,
        epilog=f"fields of a record, those in brackets may be missing:\n{records.schema()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--records", nargs="+", required=True, metavar="FILE", help=".jsonl, .csv or .tsv files, or runs' record.json"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        type=condition,
        metavar="NAME=FIELD",
        help="read a column NAME of other people's tables as a FIELD of a record; fields are listed below",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where everything is written")
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        type=condition,
        metavar="NAME=VALUE",
        help=f"keep the records with these values; names are {', '.join(records.CONDITIONS)}",
    )
    parser.add_argument(
        "--count",
        choices=records.COUNTS,
        default=records.COUNTS[0],
        help="which parameters are counted, here and in --student-params and the catalogue (non-embedding)",
    )
    parser.add_argument("--student-params", type=number, metavar="N", help="foretell the teacher of this student: 3B")
    parser.add_argument(
        "--catalogue", type=Path, default=CATALOGUE, metavar="FILE", help="teachers that can be had, a YAML file"
    )
    parser.add_argument(
        "--tokens", type=number, metavar="N", help="what the student is to be distilled on, for its cost"
    )
    parser.add_argument("--mfu", type=share, default=cost.MFU, help=f"share of the GPU's peak reached ({cost.MFU})")
    parser.add_argument(
        "--gpu-peak", type=number, default=cost.GPU_PEAK, metavar="FLOPS", help="peak operations a second (312T, A100)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="say which of several models foretells unseen students (some seconds)"
    )
    args = parser.parse_args(argv)
    if args.tokens and not args.student_params:
        parser.error("--tokens: without --student-params there is no student to price; give both")
    return args


def number(value: str) -> float:
    """3B, 126e9 or 1234."""
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
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return size


def condition(value: str) -> tuple[str, str]:
    name, equals, wanted = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value} is not NAME=VALUE, like init=pruned")
    return name, wanted


def fit_law(args: argparse.Namespace) -> None:
    """Reads, fits, writes, and says in a few lines what came out.

    Raises:
        LawError, UserError: before anything is written.
    """
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")
    everything = records.read(args.records, dict(args.rename))
    if twice := [name for name, _ in args.where if [given for given, _ in args.where].count(name) > 1]:
        raise UserError(f"--where {twice[0]}: given twice; one value would do")
    found = analysis.analyse(records.select(everything, dict(args.where)), args.count, everything)
    advice = None
    if args.student_params:
        teachers, init = read_catalogue(args.catalogue, args.count), found.records[0].init
        advice = advise(found.process, args.student_params, teachers, args.tokens, init)
    scores = analysis.compared(found) if args.compare else []
    args.out.mkdir(parents=True, exist_ok=True)
    plot.curse(found, args.out / "curse.png")
    plot.optimum(found, args.out / "optimum.png")
    plot.law(found, args.out / "law.png", advice)
    plot.compute(found, args.out / "compute.png")
    (args.out / "causes.png").unlink(missing_ok=True)
    if found.causes:
        plot.causes(found, args.out / "causes.png")
    text = report.write(found, advice, scores, args.mfu, args.gpu_peak)
    write_atomically(args.out / "report.md", text)
    write_atomically(args.out / "report.html", html_page.page(text, args.out))
    write_atomically(args.out / "law.json", analysis.as_json(found, advice, scores))
    if advice is not None:
        recommend(advice)
    print(report.headline(found))
    for remark in found.remarks:
        print(f"note: {remark}")
    pictures = "curse.png, optimum.png, law.png, compute.png" + ", causes.png" * bool(found.causes)
    print(f"wrote {args.out}/law.json, report.md, report.html, {pictures}")


def recommend(advice: Advice) -> None:
    """What to do comes first, and first of all where the runs cannot tell."""
    if advice.refusal is not None:
        print(f"no recommendation: {advice.refusal}")
        return
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


def read_catalogue(path: Path, count: str) -> dict[str, float]:
    """Teachers' parameters by `line/member`.

    Raises:
        UserError: no such file, or a member that is no model.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from megatron_capgap.config.schema import ModelShape
    from megatron_capgap.models import size

    try:
        lines: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--catalogue {path}: cannot be read ({reason}); give a YAML file of lines of models") from None
    counted = size.non_embedding_parameters if count == "non-embedding" else size.parameters
    adapter, sizes = TypeAdapter(ModelShape), {}
    if not isinstance(lines, Mapping) or not all(isinstance(members, Mapping) for members in lines.values()):
        raise UserError(f"--catalogue {path}: LINE: {{MEMBER: {{layers: ..., hidden: ..., ...}}}} would do")
    for line, members in lines.items():
        for member, shape in members.items():
            try:
                sizes[f"{line}/{member}"] = float(counted(adapter.validate_python(shape)))
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, (line, member, *first["loc"])))
                raise UserError(f"--catalogue {path}: {key}: {first['msg']}; mend or remove that member") from None
    return sizes


if __name__ == "__main__":
    sys.exit(main())
