"""Draws the transfer of a global batch's hidden states between two layouts, from the transfer plan.

    python tools/draw_layouts.py --out docs/teacher_layouts.svg

Four ranks, eight samples: the teacher with tensor 2 x pipeline 2 and sequence parallelism, the student with pipeline 2
x data 2.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_capgap.config.schema import Config, DataConfig, Layout, StudentConfig, TeacherConfig
from megatron_capgap.config.training import TrainConfig
from megatron_capgap.distillation import transfer_plan
from megatron_capgap.distillation.transfer_plan import ModelPlacement, RankSlice

WORLD, SAMPLES = 4, 8
COLOURS = ("#1b9e77", "#66c2a5", "#d95f02", "#fc8d62", "#7570b3", "#8da0cb", "#e7298a", "#e78ac3")
WIDTH, HEIGHT, TOP = 920, 430, 60
BOX, BOX_HEIGHT, STEP = 240, 70, 90  # width and height of a rank's box, distance between boxes
CELL, CELL_HEIGHT = 24, 32


def main(argv: list[str] | None = None) -> int:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture())
    return 0


def picture() -> str:
    """The picture as SVG."""
    config = Config(
        "run",
        StudentConfig(layout=Layout(pipeline=2)),
        DataConfig("tokenizer", sequence_length=SAMPLES),
        teacher=TeacherConfig("teacher", layout=Layout(tensor=2, pipeline=2, sequence=True)),
        train=TrainConfig(global_batch=SAMPLES, micro_batch=2),
    )
    teacher, student = transfer_plan.model_placements(config, WORLD)
    left, right = 20, WIDTH - BOX - 20
    shapes = [
        text(left, 24, "teacher: tensor 2 x pipeline 2, sequence parallel"),
        text(right, 24, "student: pipeline 2 x data 2"),
        text((WIDTH - 150) / 2, 24, "transfer, once per step"),
        *side(teacher, left, "forward", "sends"),
        *side(student, right, "forward", "receives"),
        *arrows(teacher, student, left + BOX, right),
        text(
            20,
            HEIGHT - 12,
            "One colour per sample; half of a cell is half of its sequence. Dashed: already on this rank.",
        ),
    ]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    arrow = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    marker = f'<defs>{arrow}<path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>'
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, marker, back, *shapes, "</svg>"]) + "\n"


def side(model: ModelPlacement, x: int, before: str, last: str) -> Iterator[str]:
    """The ranks of one model, by stage: what each rank does with which samples."""
    for stage in range(model.layout.pipeline):
        ends = stage == model.layout.pipeline - 1
        for slab in model.rank_slices(stage):
            y = TOP + slab.rank * STEP
            fill = "#fff7e6" if ends else "#f4f4f4"
            yield f'<rect x="{x}" y="{y}" width="{BOX}" height="{BOX_HEIGHT}" rx="6" fill="{fill}" stroke="#444"/>'
            yield text(x + 10, y + 18, f"rank {slab.rank}, stage {stage}: {last if ends else before}")
            yield from cells(slab, model.length, x + 10, y + 27)


def cells(slab: RankSlice, length: int, x: int, y: int) -> Iterator[str]:
    """The samples of a rank's slice; the part of the sequence that the slice covers is filled."""
    for column, sample in enumerate(sorted(slab.samples)):
        left = x + column * (CELL + 3)
        yield f'<rect x="{left}" y="{y}" width="{CELL}" height="{CELL_HEIGHT}" fill="none" stroke="#bbb"/>'
        for start, stop in slab.spans:
            top, height = y + CELL_HEIGHT * start / length, CELL_HEIGHT * (stop - start) / length
            yield f'<rect x="{left}" y="{top:g}" width="{CELL}" height="{height:g}" fill="{COLOURS[sample]}"/>'
        yield text(left + 8, y + 21, str(sample))


def arrows(teacher: ModelPlacement, student: ModelPlacement, left: int, right: int) -> Iterator[str]:
    """Transfers between ranks, with the samples and rows of each pair."""
    held, needed = teacher.rank_slices(teacher.layout.pipeline - 1), student.rank_slices(student.layout.pipeline - 1)
    found = transfer_plan.row_ranges(held, needed)
    pairs = Counter((piece.source, piece.target) for piece in found)
    rows = {(piece.source, piece.target): piece.rows for piece in found}
    for (source, target), count in sorted(pairs.items()):
        start, end = (TOP + rank * STEP + BOX_HEIGHT / 2 for rank in (source, target))
        start, end = start + 10 * (target - source), end + 10 * (source - target)
        dashes = ' stroke-dasharray="5 4"' if source == target else ""
        yield (
            f'<line x1="{left + 4}" y1="{start:g}" x2="{right - 6}" y2="{end:g}" stroke="#444" stroke-width="1.5"'
            f'{dashes} marker-end="url(#tip)"/>'
        )
        share = "1/2" if rows[source, target] < student.length else "1/1"
        at = 0.25 if source < target else 0.2
        yield text(left + (right - left) * at, start + (end - start) * at - 6, f"{count} x {share} sequence")


def text(x: float, y: float, words: str) -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}">{words}</text>'


if __name__ == "__main__":
    raise SystemExit(main())
