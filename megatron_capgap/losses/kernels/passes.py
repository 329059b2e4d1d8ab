"""Triton kernels over a chunk of logits of one vocabulary shard.

statistics  reads both models' logits once: log-sum-exp of each, the logit at the label and, for the rows of the table
            with a chain rule, the means of both log-probabilities under W (see `divergences.py`).
resolve     combines the statistics of all shards, a few numbers per token.
sums        only for rows without a chain rule: reads both once more, with the normalisers of the whole vocabulary.
gradient    reads both once more and writes the gradient over the student's logits, in their type.
listed      only for sparse teachers: writes the gradient at the listed tokens.

With a chain rule the means suffice, because value and gradient term are W times a form linear in (log p, log q):
sum_v value_v = formula(1, 1, mean_W log p, mean_W log q), and likewise the gradient term up to a multiple of q.

Shapes: c tokens, w real columns in rows of `stride` numbers; stride is a multiple of 16, so that loads and stores of
whole rows, whose last columns are masked in registers, are 128 bits wide. All arithmetic is in EXACT (fp32, or fp64 for
fp64 logits); other numbers than shapes are constants of that type, because Triton passes numbers to a kernel in fp32.
MODE: 0 without a teacher, 1 with a sparse teacher, 2 with a dense one. WEIGHT: 0 without a chain rule, 1 if W is the
teacher's probability, 2 if it is the student's. INVERSE: 1 / temperature.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE, SPARSE, DENSE = 0, 1, 2
WEIGHTS = {None: 0, "teacher": 1, "student": 2}
RESOLVED = ("lse", "lse_of_tempered", "lse_of_teacher", "cross_entropy", "divergence", "gradient_term")
"""Rows of the resolved statistics [6, c]: log-sum-exps over the whole vocabulary of the student's logits, of both
models' logits divided by the temperature; cross-entropy; divergence with T^2; sum of gradient terms."""


@triton.jit
def _online(top, total, x):
    """Maximum and sum of exponentials below it, after one more block x."""
    new = tl.maximum(top, tl.max(x, 0))
    keep = tl.exp(top - new)
    terms = tl.exp(x - new)
    return new, total * keep + tl.sum(terms, 0), keep, terms


@triton.jit
def _moved(mean, total, keep, top, new, terms, x, real):
    """Sum of terms times (x - maximum), after one more block; `total` and `top` are those before it."""
    return keep * (mean + total * (top - new)) + tl.sum(tl.where(real, terms * (x - new), 0.0), 0)


@triton.jit(do_not_specialize=["start", "c"])
def statistics_kernel(
    student, teacher, labels, out, start, width, stride, c,
    MODE: tl.constexpr, TEMPERED: tl.constexpr, WEIGHT: tl.constexpr, INVERSE: tl.constexpr, NOTHING: tl.constexpr,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [m, c]: log-sum-exp of the student, its logit at the label | of s / T | of t / T | means of both
    log-probabilities of the shard under W. One row a program; an empty shard has the log-sum-exp NOTHING."""
    row = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, EXACT)
    top_s = tl.full((), NOTHING, EXACT)
    top_q, top_p = top_s, top_s
    sum_s, sum_q, sum_p, mean_q, mean_p = zero, zero, zero, zero, zero
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < width
        s = tl.load(student + row * stride + column, column < stride, other=0.0).to(EXACT)
        s = tl.where(real, s, float("-inf"))
        if TEMPERED:
            top_s, sum_s, _, _ = _online(top_s, sum_s, s)
            s = s * tl.full((), INVERSE, EXACT)
        old_q, total_q = top_q, sum_q
        top_q, sum_q, keep_q, terms_q = _online(top_q, sum_q, s)
        if WEIGHT == 2:
            mean_q = _moved(mean_q, total_q, keep_q, old_q, top_q, terms_q, s, real)
        if MODE == 2:
            t = tl.load(teacher + row * stride + column, column < stride, other=0.0).to(EXACT)
            t = tl.where(real, t, float("-inf"))
            if TEMPERED:
                t = t * tl.full((), INVERSE, EXACT)
            old_p, total_p = top_p, sum_p
            top_p, sum_p, keep_p, terms_p = _online(top_p, sum_p, t)
            if WEIGHT == 1:
                mean_p = _moved(mean_p, total_p, keep_p, old_p, top_p, terms_p, t, real)
                mean_q = _moved(mean_q, total_p, keep_p, old_q, top_q, terms_p, s, real)
            if WEIGHT == 2:
                mean_p = _moved(mean_p, total_q, keep_q, old_p, top_p, terms_q, t, real)
    label = tl.load(labels + row) - start
    here = (label >= 0) & (label < width)
    at_label = tl.load(student + row * stride + label, here, other=0.0).to(EXACT)
    one = tl.full((), 1.0, EXACT)
    sum_q = tl.where(sum_q == 0.0, one, sum_q)
    log_q = tl.log(sum_q)
    lse_s = top_s + tl.log(tl.where(sum_s == 0.0, one, sum_s)) if TEMPERED else top_q + log_q
    tl.store(out + row, lse_s)
    tl.store(out + c + row, at_label)
    if MODE != 0:
        tl.store(out + 2 * c + row, top_q + log_q)
    if MODE == 2:
        sum_p = tl.where(sum_p == 0.0, one, sum_p)
        log_p = tl.log(sum_p)
        tl.store(out + 3 * c + row, top_p + log_p)
        if WEIGHT != 0:
            total = sum_p if WEIGHT == 1 else sum_q
            tl.store(out + 4 * c + row, mean_p / total - log_p)
            tl.store(out + 5 * c + row, mean_q / total - log_q)


@triton.jit
def _over_ranks(gathered, row, token, real, c, m, ranks, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp [BLOCK] of one row of the statistics over the ranks."""
    top = tl.full((BLOCK,), float("-inf"), EXACT)
    total = tl.zeros((BLOCK,), EXACT)
    for rank in range(0, ranks):
        x = tl.load(gathered + (rank * m + row) * c + token, real, other=0.0)
        new = tl.maximum(top, x)
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    return top + tl.log(total)


@triton.jit(do_not_specialize=["c", "m", "ranks"])
def resolve_kernel(
    gathered, out, c, m, ranks,
    MODE: tl.constexpr, WEIGHT: tl.constexpr, SQUARE: tl.constexpr, FORMULA: tl.constexpr,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gathered [ranks, m, c], the statistics -> out [6, c], see RESOLVED; SQUARE is the squared temperature.

    Without a chain rule the last two rows are left to `sums_kernel`, and with a sparse teacher to the caller.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < c
    lse = _over_ranks(gathered, 0, token, real, c, m, ranks, EXACT, BLOCK)
    at_label = tl.zeros((BLOCK,), EXACT)
    for rank in range(0, ranks):
        at_label += tl.load(gathered + (rank * m + 1) * c + token, real, other=0.0)
    tl.store(out + token, lse, real)
    tl.store(out + 3 * c + token, lse - at_label, real)
    if MODE != 0:
        lse_q = _over_ranks(gathered, 2, token, real, c, m, ranks, EXACT, BLOCK)
        tl.store(out + c + token, lse_q, real)
    if MODE == 2:
        lse_p = _over_ranks(gathered, 3, token, real, c, m, ranks, EXACT, BLOCK)
        tl.store(out + 2 * c + token, lse_p, real)
        if WEIGHT != 0:
            log_p = tl.zeros((BLOCK,), EXACT)
            log_q = tl.zeros((BLOCK,), EXACT)
            for rank in range(0, ranks):
                at = gathered + rank * m * c + token
                mass_q = tl.load(at + 2 * c, real, other=0.0) - lse_q
                mass_p = tl.load(at + 3 * c, real, other=0.0) - lse_p
                share = tl.exp(mass_p if WEIGHT == 1 else mass_q)
                log_p += share * (tl.load(at + 4 * c, real, other=0.0) + mass_p)
                log_q += share * (tl.load(at + 5 * c, real, other=0.0) + mass_q)
            one = tl.full((BLOCK,), 1.0, EXACT)
            value, term = FORMULA(one, one, log_p, log_q)
            tl.store(out + 4 * c + token, value * tl.full((), SQUARE, EXACT), real)
            tl.store(out + 5 * c + token, term, real)


@triton.jit(do_not_specialize=["c"])
def sums_kernel(
    student, teacher, resolved, out, width, stride, c,
    TEMPERED: tl.constexpr, INVERSE: tl.constexpr, SQUARE: tl.constexpr, FORMULA: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [2, c]: sums over the shard of the divergence's values, times T^2, and of the gradient terms."""
    row = tl.program_id(0).to(tl.int64)
    lse_q = tl.load(resolved + c + row)
    lse_p = tl.load(resolved + 2 * c + row)
    values = tl.full((), 0.0, EXACT)
    terms = tl.full((), 0.0, EXACT)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = column < width
        s = tl.load(student + row * stride + column, column < stride, other=0.0).to(EXACT)
        t = tl.load(teacher + row * stride + column, column < stride, other=0.0).to(EXACT)
        if TEMPERED:
            s = s * tl.full((), INVERSE, EXACT)
            t = t * tl.full((), INVERSE, EXACT)
        log_q = s - lse_q
        log_p = t - lse_p
        value, term = FORMULA(tl.exp(log_p), tl.exp(log_q), log_p, log_q)
        values += tl.sum(tl.where(real, value, 0.0), 0)
        terms += tl.sum(tl.where(real, term, 0.0), 0)
    tl.store(out + row, values * tl.full((), SQUARE, EXACT))
    tl.store(out + c + row, terms)


@triton.jit(do_not_specialize=["start", "c"])
def gradient_kernel(
    student, teacher, labels, weights, resolved, start, width, stride, c,
    CROSS_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, MODE: tl.constexpr, TEMPERED: tl.constexpr,
    INVERSE: tl.constexpr, FORMULA: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The student's logits become, entry by entry and times the token's loss mask,

        CROSS_ENTROPY (softmax(s) - [label]) + DIVERGENCE (q * sum of terms - term)        q = softmax(s / T)

    With a sparse teacher the row `gradient_term` holds the factor of q instead, and terms are written by
    `listed_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = student + row * stride + column
    s = tl.load(at, column < stride, other=0.0).to(EXACT)
    weight = tl.load(weights + row)
    on_softmax = weight * tl.full((), CROSS_ENTROPY, EXACT)
    label = tl.load(labels + row) - start
    softmax = tl.exp(s - tl.load(resolved + row))
    gradient = on_softmax * softmax - tl.where(column == label, on_softmax, 0.0)
    if MODE != 0:
        on_divergence = weight * tl.full((), DIVERGENCE, EXACT)
        if TEMPERED:
            log_q = s * tl.full((), INVERSE, EXACT) - tl.load(resolved + c + row)
            q = tl.exp(log_q)
        else:
            log_q = s - tl.load(resolved + row)
            q = softmax
        of_divergence = q * tl.load(resolved + 5 * c + row)
        if MODE == 2:
            t = tl.load(teacher + row * stride + column, column < stride, other=0.0).to(EXACT)
            if TEMPERED:
                t = t * tl.full((), INVERSE, EXACT)
            log_p = t - tl.load(resolved + 2 * c + row)
            _, term = FORMULA(tl.exp(log_p), q, log_p, log_q)
            of_divergence = of_divergence - term
        gradient += on_divergence * of_divergence
    tl.store(at, gradient.to(student.dtype.element_ty), column < stride)


@triton.jit(do_not_specialize=["start", "k"])
def listed_kernel(logits, ids, values, start, width, stride, k, BLOCK: tl.constexpr):
    """logits [c, w] at ids [c, k] of the whole vocabulary = values [c, k], where the shard holds the id."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    column = tl.load(ids + row * k + index, index < k, other=-1) - start
    value = tl.load(values + row * k + index, index < k, other=0.0)
    here = (index < k) & (column >= 0) & (column < width)
    tl.store(logits + row * stride + column, value.to(logits.dtype.element_ty), here)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel on its first argument's device.

    Without contraction to fused multiply-adds, so that equal logits of both models have equal probabilities.
    """
    first: Tensor = arguments[0]
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, enable_fp_fusion=False, **options)
