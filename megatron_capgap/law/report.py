"""Builds report.md: results and their uncertainty, for the choice of a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_capgap.law import cost, curves, fit, verdict
from megatron_capgap.law.advice import Advice, Candidate
from megatron_capgap.law.analysis import Analysis
from megatron_capgap.law.compare import Score
from megatron_capgap.law.formatting import formula, short
from megatron_capgap.law.labels import Against
from megatron_capgap.law.next_runs import MIN_GAIN, NextRunsPlan, Step
from megatron_capgap.law.paper_reading import PaperFit
from megatron_capgap.law.records import conditions
from megatron_capgap.law.verdict import FLAT, INTERIOR, SATURATING, SMALLEST

SHOWN_CANDIDATES = 8
SCALES = {
    "shared": "how much the curve that all students share departs from a line",
    "drift": "how much it changes with the student's size",
    "own": "how much one student's curve differs from it",
    "luck": "how much a teacher's training matters beyond its size and its own loss",
    "noise": "how much another seed changes one run",
}


def write(
    study: Analysis,
    advice: Advice | None = None,
    scores: Sequence[Score] = (),
    mfu: float = cost.MFU,
    peak: float = cost.GPU_PEAK,
    plan: NextRunsPlan | None = None,
) -> str:
    """The report as Markdown.

    Args:
        study: the analysis of the records.
        advice: the recommendation for a student, if requested.
        scores: how well models predict unseen students, if requested.
        mfu: share of the GPU's peak assumed for GPU-hours.
        peak: that peak, FLOP/s.
        plan: the proposed next runs, if requested.
    """
    parts = ["# Which teacher: what these runs say"]
    if advice is not None:
        parts += [_advice(advice, mfu, peak)]
    if plan is not None:
        parts.append(_plan(plan))
    parts += [_summary(study), "![loss against teacher size](curse.png)", _students(study)]
    parts.append("![where the best teacher is](optimum.png)")
    if study.causes:
        parts.append(_causes(study))
    parts.append(_scales(study))
    if scores:
        parts.append(_scores(scores))
    parts += ["![compute and loss](compute.png)", _teachers(study), _paper_fit(study.reading)]
    parts.append("## Limits of these runs\n\n" + ("\n".join(f"- {text}" for text in study.remarks) or "None found."))
    parts.append(_conditions(study))
    return "\n\n".join(parts) + "\n"


def at_equal_flops(advice: Advice) -> str:
    """One line on whether to distil or to train on labels alone."""
    first = advice.candidates[0]
    if first.against is None:
        return f"distil, or train on labels alone for the same FLOPs: these runs cannot tell, for {advice.labels}"
    best = max(advice.candidates, key=lambda each: each.against.gain[1] if each.against else 0.0)
    assert best.against is not None
    if first.against.gain[1] > 0:
        return f"distil: with {first.name} {_beats(first.against)}"
    if best.against.gain[1] > 0:
        return (
            f"do not distil with {first.name}: {_beats(first.against)}; distil with {best.name}: {_beats(best.against)}"
        )
    return f"do not distil: even with {best.name} {_beats(best.against)}"


def _beats(against: Against) -> str:
    low, middle, high = against.gain
    side, probability = ("lower", against.probability) if middle > 0 else ("higher", 1 - against.probability)
    ends = (low, high) if middle > 0 else (-high, -low)
    return (
        f"the student ends {abs(middle):.4f} nats ({ends[0]:.4f} to {ends[1]:.4f}) {side} than on labels alone for the "
        f"same FLOPs, which are {against.times:.2f} times the tokens; probability {probability:.2f}"
    )


def plan_table(plan: NextRunsPlan) -> str:
    """The proposed next runs, one line per step."""
    if not plan.steps:
        return (
            f"what to run next: none of {plan.considered} steps within {plan.budget:.3g} FLOPs is expected to gain "
            f"{MIN_GAIN:g} nats a token; the expected regret of the recommendation is {plan.regret:.5f}"
        )
    lines = [
        f"what to run next, within {plan.budget:.3g} FLOPs: the expected regret of the recommendation, "
        f"{plan.regret:.5f} nats a token, falls to {plan.regret_after:.5f} with {plan.flops:.3g} FLOPs",
        "   FLOPs     gain  cells",
    ]
    return "\n".join([*lines, *(f"{step.flops:8.2e}  {step.gain:.5f}  {_cells(plan, step)}" for step in plan.steps)])


def _plan(plan: NextRunsPlan) -> str:
    first, *rows = plan_table(plan).splitlines()
    lines = ["## What to run next", "", f"{first[0].upper()}{first[1:]}."]
    if rows:
        body = [f"| {step.flops:.3g} | {step.gain:.5f} | {_cells(plan, step)} |" for step in plan.steps]
        lines += ["", "| FLOPs | gain, nats a token | cells |", "|---|---|---|", *body]
        lines += [
            "",
            "Gain: by how much these runs are expected to lower the expected regret of the recommendation, on top of "
            "the rows above, by simulation of their losses from the posterior. FLOPs: of distilling, and of the "
            "teachers that must be trained first. The largest gain for each operation comes first.",
        ]
    return "\n".join(lines)


def _cells(plan: NextRunsPlan, step: Step) -> str:
    """The runs of a step as text, grouped by teacher and seed."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for run in step.runs:
        training = "another training" if run.training >= plan.known else ""
        if not training and run.teacher_seed is not None:
            training = f"training {run.teacher_seed}"
        key = (" ".join(filter(None, (run.teacher.name, training))), run.seed)
        groups.setdefault(key, []).append(short(run.student))
    return "; ".join(f"{', '.join(names)} under {teacher}, seed {seed}" for (teacher, seed), names in groups.items())


def headline(study: Analysis) -> str:
    """One line: law or no law, and the reason."""
    counts = {name: sum(each.verdict == name for each in study.findings) for name in (INTERIOR, SMALLEST, SATURATING)}
    seen = {
        INTERIOR: "have a best teacher inside the grid",
        SMALLEST: "do best with the smallest teacher",
        SATURATING: "gain from larger teachers without getting worse again",
    }
    parts = [f"{number} of {len(study.findings)} students {seen[name]}" for name, number in counts.items() if number]
    text = "; ".join(parts) or f"for none of {len(study.findings)} students do the runs tell where its best teacher is"
    return f"{'law' if study.law else 'no law identified'}: {text}"


def _summary(study: Analysis) -> str:
    line = headline(study)
    word, _, rest = line.partition(": ")
    return (
        f"## Verdict\n\n**{word[0].upper()}{word[1:]}.** {rest[0].upper()}{rest[1:]}. A best teacher "
        f"inside the grid needs a probability of {verdict.SURE:g}, a curve that only rises or falls one of "
        f"{verdict.SURE_ONE_WAY:g}, and the word law {verdict.STUDENTS} students with a best teacher inside the grid."
    )


def _students(study: Analysis) -> str:
    lines = [
        "## Students",
        "",
        "| student | verdict | P(interior) | P(smallest) | P(saturating) | P(flat) | best T/S | measured | tried |",
        "|---" * 9 + "|",
    ]
    for each in study.findings:
        shares = " | ".join(f"{each.probabilities[name]:.2f}" for name in (INTERIOR, SMALLEST, SATURATING, FLAT))
        low, high = (end / each.student for end in each.interval)
        best = f"{each.best / each.student:.2f} ({low:.2f} to {high:.2f})"
        looked = f"{each.grid[0] / each.student:.2f} to {each.grid[-1] / each.student:.2f}"
        measured = f"{each.measured / each.student:.2f}"
        lines.append(f"| {short(each.student)} | {each.verdict} | {shares} | {best} | {measured} | {looked} |")
    lines += [
        "",
        f"Interior: the loss falls towards larger teachers and rises again, by {verdict.MATTERS:g} nats or more each. "
        "Smallest: it only rises. Saturating: it falls and does not rise again. Flat: neither. Best T/S: the median "
        f"and the {100 * verdict.LEVEL:.0f}% interval of the best teacher between the smallest and the largest that "
        "the student was trained with, for a typical outcome of the teacher's training; at an end of these the best "
        "may lie beyond. "
        "Measured: the teacher with the lowest mean loss as measured, including training variance. Where the two "
        "differ, the model attributes the difference to variance of that teacher's training, which only further "
        "trainings of its size can show. "
        "All of this supposes the model below.",
    ]
    return "\n".join(lines)


def _scales(study: Analysis) -> str:
    scales = study.process.scales()
    lines = [
        "## Where the differences come from",
        "",
        "| part of the model | standard deviation, nats a token |",
        "|---|---|",
    ]
    lines += [f"| {text} | {scales[name]:.2g} |" for name, text in SCALES.items()]
    lines.append(
        "| how much teachers' trainings matter beyond their size, by their own loss and otherwise | "
        f"{study.process.teachers().std():.2g} |"
    )
    lines += [
        "",
        "One Gaussian process of all runs: a level for each student and seed, a smooth function of log(T/S), a random "
        "effect for each training of a teacher, and the teacher's own loss where the records hold it.",
    ]
    return "\n".join(lines)


def _causes(study: Analysis) -> str:
    lines = [
        "## Effects of initialisation and teaching",
        "",
        "| student | pairs | start, small to large teacher | teaching, smallest teacher | teaching, largest teacher |",
        "|---" * 5 + "|",
    ]
    for each in study.causes:
        start = "the same" if each.start is None else f"{each.rise_of_start:+.4f}"
        ends = (each.teaching[:, place] for place in (0, -1))
        gains = [f"{middle:+.4f} ({low:+.4f} to {high:+.4f})" for low, middle, high in ends]
        lines.append(f"| {short(each.student)} | {each.pairs} | {start} | {' | '.join(gains)} |")
    lines += [
        "",
        "Nats a token, over the ratios looked at. Start: how much worse the student ends on labels alone when its "
        "start was pruned from the largest teacher and not from the smallest: the cost of more pruning. Teaching: how "
        "much better the same start ends with the teacher than on labels alone. A curse of teaching would show as a "
        "gain that falls towards larger teachers.",
        "",
        "![the start and the teaching](causes.png)",
    ]
    return "\n".join(lines)


def _scores(scores: Sequence[Score]) -> str:
    lines = [
        "## Prediction of unseen students",
        "",
        "| model | error | regret | worst regret | small to large | teacher left out |",
        "|---" * 6 + "|",
    ]
    for each in scores:
        numbers = (each.error, each.regret, each.worst, each.small_to_large, each.teacher_out)
        lines.append(f"| {each.model} | {' | '.join('-' if x is None else f'{x:.4f}' for x in numbers)} |")
    (_, first), *others = [(each.model, each.error) for each in scores if each.error is not None]
    if better := [model for model, error in others if error < first]:
        lines += ["", f"The verdicts are the first model's; better than it at this: {', '.join(better)}."]
    lines += [
        "",
        "Nats a token. Error: of the losses of a student that the model was not fitted to, each student in turn. "
        "Regret: what that student would lose by the teacher that the model picks of those tried. Small to large: the "
        "error for the larger half of the students, from the smaller. Teacher left out: the error for the students of "
        "a size of teachers that the model was not fitted to, each size in turn; the smallest and the largest lie "
        "beyond what it was fitted to.",
    ]
    return "\n".join(lines)


def _teachers(study: Analysis) -> str:
    lines = ["## Teachers", "", "| teacher | training | trained on | its own held-out loss |", "|---|---|---|---|"]
    for each in study.trainings:
        tokens = f"{each.tokens:,} tokens" if each.tokens else "-"
        loss = "-" if each.loss is None else f"{each.loss:.4f}"
        lines.append(f"| {short(each.size)} | {'-' if each.seed is None else each.seed} | {tokens} | {loss} |")
    return "\n".join(lines)


def _paper_fit(reading: PaperFit) -> str:
    k, b = fit.PAPER
    lines = [
        "## The paper's reading",
        "",
        f"The paper found T = {k} S - {short(-b)} from the best teacher on each student's grid. The same method, "
        "parabolas for single students and a line through their vertices, gives here:",
        "",
    ]
    if reading.chosen is not None:
        intervals = reading.chosen.intervals() or {}
        spread = ", ".join(f"{name} {_number(low)} to {_number(high)}" for name, (low, high) in intervals.items())
        lines.append(f"{formula(reading.chosen)} ({100 * curves.LEVEL:.0f}% interval: {spread or 'unknown'}).")
    else:
        lines.append("no line.")
    lines.append(
        "It takes the variance of each teacher's training for an effect of its size, and its optima follow the grid; "
        "where teachers differ by such variance it names a law in most grids that have none. Compare with the verdict; "
        "do not act on it."
    )
    lines += ["", *(f"- {text}" for text in reading.remarks)] if reading.remarks else []
    return "\n".join(lines)


def _advice(advice: Advice, mfu: float, peak: float) -> str:
    title = f"## The teacher for a student of {short(advice.student)}\n\n"
    if advice.refusal is not None:
        return f"{title}**No recommendation:** {advice.refusal}."
    assert advice.best is not None and advice.interval is not None and advice.within is not None
    first = advice.candidates[0]
    low, high = advice.interval
    choice = at_equal_flops(advice)
    lines = [
        f"**{choice[0].upper()}{choice[1:]}.**\n",
        *(f"**Warning:** {text}.\n" for text in advice.warnings),
        f"**{first.name}** ({short(first.teacher)}): expected regret {first.regret:.4f} nats a token "
        f"({first.interval[0]:.4f} to {first.interval[1]:.4f}). Between {short(advice.within[0])} and "
        f"{short(advice.within[1])}, of which these runs tell, the best teacher is around {short(advice.best)} "
        f"({short(low)} to {short(high)}). The teacher must share the student's tokenizer, and "
        "the weights of divergence and cross-entropy were not tuned for each teacher.",
        "",
        "| teacher | parameters | T/S | regret | interval | P(best) | loss | above labels | FLOPs | GPU-hours |",
        "|---" * 10 + "|",
        *(_candidate(advice, each, mfu, peak) for each in advice.candidates[:SHOWN_CANDIDATES]),
        "",
        "Regret: loss above that of the best teacher of that range, nats a token. Loss: on as many tokens as these "
        "runs. Above labels: the loss above that on labels alone for the same FLOPs; below 0 distilling wins. Price: 6 "
        "operations a token for each student parameter, 2 for each teacher parameter; one GPU at "
        f"{100 * mfu:.0f}% of {peak / 1e12:.0f} TFLOP/s.",
    ]
    lines += ["", "![price and loss](price.png)"]
    if advice.outside:
        lines.append("")
        shown = ", ".join(advice.outside[:SHOWN_CANDIDATES])
        more = f" and {len(advice.outside) - SHOWN_CANDIDATES} more" * (len(advice.outside) > SHOWN_CANDIDATES)
        lines.append(f"At sizes or ratios that were not tried: {shown}{more}.")
    return title + "\n".join(lines)


def _candidate(advice: Advice, each: Candidate, mfu: float, peak: float) -> str:
    price = ["-", "-"]
    if each.flops is not None:
        price = [f"{each.flops:.3g}", f"{cost.gpu_hours(each.flops, mfu, peak):,.3g}"]
    cells = [
        each.name,
        short(each.teacher),
        f"{each.teacher / advice.student:.2f}",
        f"{each.regret:.4f}",
        f"{each.interval[0]:.4f} to {each.interval[1]:.4f}",
        f"{each.probability:.2f}",
        f"{each.losses[1]:.4f}",
        "-" if each.against is None else f"{-each.against.gain[1]:+.4f}",
        *price,
    ]
    return f"| {' | '.join(cells)} |"


def _conditions(study: Analysis) -> str:
    described = [_condition(name, value) for name, value in conditions(study.records).items() if value is not None]
    seeds = sorted({record.seed for record in study.records})
    return (
        f"## What it holds for\n\n{len(study.records)} runs, seeds {', '.join(map(str, seeds))}; parameters counted "
        f"{study.count}; {'; '.join(described)}. Other tokens, another start of the student or another objective may "
        "have other curves."
    )


def _condition(name: str, value: object) -> str:
    return f"{name} {value}" if name != "taught" else "with teacher" if value else "without teacher"


def _number(value: float) -> str:
    return short(value) if abs(value) >= 1000 else f"{value:.3g}"
