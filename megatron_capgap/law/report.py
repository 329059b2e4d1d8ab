"""report.md: what was found, in plain words, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_capgap.law import cost, curves, fit
from megatron_capgap.law.fit import Law
from megatron_capgap.law.records import conditions
from megatron_capgap.law.study import Prediction, Study
from megatron_capgap.law.words import formula, short

SHOWN_CANDIDATES = 5


def write(
    study: Study,
    prediction: Prediction | None = None,
    saving: cost.Saving | None = None,
    doubts: Sequence[str] = (),
    mfu: float = cost.MFU,
    peak: float = cost.GPU_PEAK,
) -> str:
    """The report as Markdown.

    Args:
        study: what the records say.
        prediction: the teacher for a student, where one was asked for.
        saving: what that student costs, where its tokens are known.
        doubts: what to keep in mind about the prediction.
        mfu: share of the GPU's peak that GPU-hours suppose.
        peak: that peak, operations a second.
    """
    parts = ["# The law of capacity gap in these runs", _summary(study), *_pictures(study), _students(study)]
    parts.append(_teachers(study))
    if study.laws:
        parts.append(_laws(study))
    parts.append(_paper(study))
    if prediction is not None:
        parts.append(_prediction(study, prediction))
    if saving is not None:
        parts.append(_cost(study, saving, mfu, peak))
    remarks = [*study.remarks, *doubts]
    parts.append("## How sure this is\n\n" + ("\n".join(f"- {text}" for text in remarks) or "Nothing to remark."))
    parts.append(_conditions(study))
    return "\n\n".join(parts) + "\n"


def _summary(study: Study) -> str:
    curse = [curve for curve, found in study.optima if found.status in (curves.OPTIMUM, curves.EDGE)]
    seen = (
        f"{len(curse)} of {len(study.optima)} students got worse again with the largest teachers (the curse of "
        "capacity gap)."
    )
    if study.chosen is None:
        return (
            f"{seen} No student has surely shown a best teacher inside the grid, so these runs give no law: neither "
            "for the paper's T = 2.5 S nor against it."
        )
    return f"{seen} The best teacher follows **{formula(study.chosen)}**{_spread(study.chosen)}."


def _spread(law: Law) -> str:
    intervals = law.intervals()
    if intervals is None:
        return " (too few runs for an interval)"
    texts = [f"{name} between {_number(low)} and {_number(high)}" for name, (low, high) in intervals.items()]
    return f" ({100 * curves.LEVEL:.0f}% interval: {', '.join(texts)})"


def _pictures(study: Study) -> list[str]:
    return ["![the curse](curse.png)", "![the law](law.png)", "![compute and loss](compute.png)"]


def _students(study: Study) -> str:
    names = ["student", "best on the grid", "times S", "rise", "by chance", "optimum", "interval", "what was seen"]
    lines = ["## Students", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for curve, found in study.optima:
        optimum = short(found.teacher) if found.teacher else "-"
        interval = " to ".join(map(short, found.interval)) if found.interval else "-"
        said = found.status + (f", censored ({found.censored})" if found.censored else "")
        ratio = f"{found.best / curve.student:.2f}"
        rises = ["-" if number is None else f"{number:.4f}" for number in (found.rise, found.chance)]
        cells = [short(curve.student), short(found.best), ratio, *rises, optimum, interval, said]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Rise: the loss with the largest teacher above that with the best, nats a token. By chance: the rise that "
        f"seeds with the spread seen here exceed in at most {100 * (1 - curves.LEVEL):.0f}% of the curves of a student "
        "to whom all teachers are alike. A smaller one is no curse; one seed tells nothing of chance.",
        "",
        "The optimum is the lowest point of a parabola in the logarithm of the teacher's size, laid through at most "
        f"{curves.WINDOW} teachers around the best one, fewer where the curve leans by more than its noise. Where a "
        "curve is steep below its optimum and gentle above, the parabola still reads it somewhat too high. Censored: "
        "the best teacher is at that end of the grid, and "
        "such a student does not count in the law.",
    ]
    return "\n".join(lines)


def _teachers(study: Study) -> str:
    lines = ["## Teachers", "", "| teacher | trained on | its own validation loss |", "|---|---|---|"]
    for each in study.teachers:
        tokens = f"{each.tokens:,} tokens" if each.tokens else "-"
        loss = "-" if each.loss is None else f"{each.loss:.4f}"
        lines.append(f"| {short(each.size)} | {tokens} | {loss} |")
    return "\n".join(lines)


def _laws(study: Study) -> str:
    lines = ["## The law in its three forms", "", "| form | fit | interval | R^2 | leave one out | small to large |"]
    lines.append("|---|---|---|---|---|---|")
    for name, law in study.laws.items():
        intervals = law.intervals() or {}
        spread = ", ".join(f"{key} {_number(low)} to {_number(high)}" for key, (low, high) in intervals.items())
        numbers = ["-" if law.r2 is None else f"{law.r2:.4f}", *map(_percent, (law.leave_one_out, law.holdout))]
        mark = " (used)" if law is study.chosen else ""
        lines.append(f"| {name}{mark} | {formula(law)} | {spread or '-'} | {' | '.join(numbers)} |")
    lines += [
        "",
        "Leave one out: mean error of the teacher foretold for each student from the others. Small to large: for the "
        "larger half of the students from the smaller. R^2 of so few points says little.",
    ]
    return "\n".join(lines)


def _paper(study: Study) -> str:
    k, b = fit.PAPER
    text = (
        f"## Beside the paper\n\nThe paper found T = {k} S - {short(-b)} on GPT-2 and Pythia, reading the best teacher "
    )
    text += "off its grid; whether it counted embeddings is not known."
    reading = fit.paper_reading(study.optima)
    if reading is not None:
        sign = "+" if reading["b"] >= 0 else "-"
        text += (
            f" Read the same way, the best teachers of the {reading['students']} students here lie along "
            f"T = {reading['k']:.3g} S {sign} {short(abs(reading['b']))} (R^2 {reading['r2']:.4f})."
        )
    law = study.laws.get("proportional")
    if law is not None:
        low, high = (law.intervals() or {}).get("k", (None, None))
        if low is not None:
            text += (
                f" Its slope of {k} lies {'within' if low <= k <= high else 'outside'} the interval of k found here."
            )
    return text


def _prediction(study: Study, prediction: Prediction) -> str:
    assert study.chosen is not None
    lines = [
        f"## The teacher for a student of {short(prediction.student)}",
        "",
        f"{formula(study.chosen)} foretells **{short(prediction.teacher)}**"
        + (f", most likely between {' and '.join(map(short, prediction.interval))}." if prediction.interval else "."),
    ]
    if prediction.candidates:
        first = prediction.candidates[0]
        lines += [
            "",
            f"Closest in the catalogue is **{first.name}** ({short(first.teacher)}). Regret is the loss foretold above "
            "that of the best teacher, by the median bend of the students' curves. The teacher must share the "
            "student's tokenizer.",
            "",
            "| teacher | parameters | regret, nats a token | at most |",
            "|---|---|---|---|",
        ]
        for each in prediction.candidates[:SHOWN_CANDIDATES]:
            lines.append(f"| {each.name} | {short(each.teacher)} | {each.regret:.4f} | {each.regret_high:.4f} |")
    return "\n".join(lines)


def _cost(study: Study, saving: cost.Saving, mfu: float, peak: float) -> str:
    def row(name: str, flops: float) -> str:
        return f"| {name} | {flops:.3g} | {cost.gpu_hours(flops, mfu, peak):,.3g} |"

    runs, with_teachers = saving.breaks_even(False), saving.breaks_even(True)
    lines = [
        "## What it costs",
        "",
        f"6 operations a token for each student parameter and 2 for each teacher parameter, counted {study.count}, but "
        f"for the pilot's, which are as recorded; hours of one GPU at {100 * mfu:.0f}% of {peak / 1e12:.0f} TFLOP/s.",
        "",
        "| | FLOPs | GPU-hours |",
        "|---|---|---|",
        row("this student, the law's teacher", saving.chosen),
        row("this student, every candidate tried", saving.search),
        row("saved by the law", saving.saved),
        row("the pilot's distillations", saving.pilot),
        row("training the pilot's teachers", saving.pilot_teachers),
        "",
    ]
    if runs is None:
        return "\n".join([*lines, "There is no search to save: one candidate at most."])
    lines.append(
        f"The pilot has paid for itself with {runs} such student(s), or {with_teachers} where its teachers had to be "
        "trained."
    )
    return "\n".join(lines)


def _conditions(study: Study) -> str:
    told = [f"{name} {value}" for name, value in conditions(study.records).items() if value is not None]
    seeds = sorted({record.seed for record in study.records})
    return (
        f"## What it holds for\n\n{len(study.records)} runs, seeds {', '.join(map(str, seeds))}; parameters counted "
        f"{study.count}; {'; '.join(told)}. Other tokens, another start of the student or another objective may have "
        "another law."
    )


def _number(value: float) -> str:
    return short(value) if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
