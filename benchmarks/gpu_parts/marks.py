"""The pass marks, and what was measured beside each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpu_parts.step import CROSS_ENTROPY, OURS, PEER

Row = dict[str, Any]


class Mark(NamedTuple):
    """A mark with what was found."""

    name: str
    wanted: str
    found: str
    verdict: str
    """pass, fail, or not run (with the reason in `found`)."""


def judge(rows: list[Row]) -> list[Mark]:
    """All marks, in the order of the parts."""
    numbers = [row for row in rows if not row.keys() & {"error", "absent", "seconds"}]
    return [*_of_loss(numbers), *_of_kernels(numbers), *_of_steps(numbers), *_of_teacher(numbers), *_of_gaps(numbers)]


def _mark(name: str, limit: float, found: float | None, what: str = "", *, least: bool = False) -> Mark:
    """A mark on one number, which must be at most `limit`, or with `least` at least."""
    wanted = f"{'>=' if least else '<='} {limit:.3g}"
    if found is None:
        return Mark(name, wanted, what or "nothing to compare", "not run")
    passed = found >= limit if least else found <= limit
    return Mark(name, wanted, f"{found:.3g}{f' ({what})' if what else ''}", "pass" if passed else "fail")


def _of(rows: list[Row], part: str, case: str | None = None) -> list[Row]:
    return [row for row in rows if row["part"] == part and case in (None, row["case"])]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: row["ms"], default=None)


def _of_loss(rows: list[Row]) -> Iterator[Mark]:
    loss = _of(rows, "loss")
    gemm = next((row["flops_per_second"] for row in _of(rows, "ceilings") if row["name"] == "gemm"), None)
    cases = dict.fromkeys(row["case"] for row in loss)
    if not cases:
        yield Mark("loss", "", "part loss gave no numbers", "not run")
    for case in cases:
        here = [row for row in _of(loss, "loss", case) if row.get("objective", "kl+ce") == "kl+ce"]
        ours = [row for row in here if row["kind"] == "ours"]
        # The kernels are what the marks are for, also where they should turn out slower.
        mine = _fastest([row for row in ours if row["kernels"] == "triton"] or ours)
        if mine is None:
            yield Mark(f"loss {case}", "", "ours gave no number", "not run")
            continue
        sharded = case.startswith("TP8")
        name = f"loss {case}: {mine['name']}"
        bare = next((row for row in here if row["kind"] == "bare" and row["chunk"] == mine["chunk"]), None)
        share = _ratio(bare["ms"] if bare else None, mine["ms"])
        yield _mark(f"{name}, share of bare matrix products", 0.80 if sharded else 0.90, share, least=True)
        reached = _ratio(mine["flops"] / mine["ms"] * 1e3, gemm)
        yield _mark(f"{name}, share of the large product's rate", 0.70 if sharded else 0.85, reached, least=True)
        yield from _beside_peer(rows, here, mine, name)
        today = next((r for r in here if (r.get("kernels"), r["chunk"]) == ("eager", 512)), None)
        if mine["kernels"] == "eager":
            yield _mark(f"{name}, times as fast as eager, 512", 1.8, None, "no Triton kernels", least=True)
        elif not sharded:
            faster = _ratio(today["ms"] if today else None, mine["ms"])
            yield _mark(f"{name}, times as fast as eager, 512", 1.8, faster, least=True)


def _beside_peer(rows: list[Row], here: list[Row], mine: Row, name: str) -> Iterator[Mark]:
    peer = _fastest([row for row in here if row["kind"] == "peer" and row["exact"]])
    if peer is None:
        yield _mark(f"{name}, time beside the best exact peer", 0.67, None, "no peer was measured")
        return
    what = peer["name"]
    yield _mark(f"{name}, time beside the best exact peer", 0.67, mine["ms"] / peer["ms"], what)
    memory = _ratio(mine["peak_bytes"], peer["peak_bytes"])
    yield _mark(f"{name}, peak memory beside it", 1.0, memory, what if memory else "memory is measured on a GPU only")
    errors = {row["name"]: row["relative_error"] for row in _of(rows, "gradients", mine["case"])}
    error = _ratio(errors.get(mine["name"]), errors.get(peer["name"]))
    yield _mark(f"{name}, gradient error beside it", 1.0, error, what if error is not None else "")


def _of_kernels(rows: list[Row]) -> Iterator[Mark]:
    copy = next((row["bytes_per_second"] for row in _of(rows, "ceilings") if row["name"] == "copy"), None)
    found = [row for row in _of(rows, "kernels") if "bytes_per_second" in row]
    for row in found:
        share = _ratio(row["bytes_per_second"], copy)
        yield _mark(f"kernel {row['name']}, share of the copy's bytes/s", 0.80, share, least=True)
    if not found:
        yield _mark("kernels, share of the copy's bytes/s", 0.80, None, "no Triton kernels", least=True)


def _of_steps(rows: list[Row]) -> Iterator[Mark]:
    steps = _of(rows, "step")
    cases = dict.fromkeys(row["case"].rpartition(", ")[0] for row in steps if "ms" in row)
    if not cases:
        yield Mark("step", "", "part step gave no numbers", "not run")
    for case in cases:
        whole = {row["name"]: row for row in _of(steps, "step", f"{case}, extrapolated")}
        mine, peer, alone = (whole.get(name, {}) for name in (OURS, PEER, CROSS_ENTROPY))
        rate = _ratio(mine.get("tokens_per_second"), peer.get("tokens_per_second"))
        yield _mark(f"step {case}, tokens/s beside Hugging Face, extrapolated", 1.15, rate, least=True)
        yield _mark(f"step {case}, MFU with the teacher's forward, extrapolated", 0.45, mine.get("mfu"), least=True)
        slower = _ratio(mine.get("ms"), alone.get("ms"))
        allowed = 1.05 * alone.get("allowed", float("nan"))
        yield _mark(f"step {case}, time beside its cross-entropy step, extrapolated", allowed, slower)
        measured = [row for row in steps if row["case"].startswith(f"{case}, ") and row.get("peak_bytes")]
        peaks = {
            name: max((r["peak_bytes"] for r in measured if r["name"] == name), default=None) for name in (OURS, PEER)
        }
        memory = _ratio(peaks[OURS], peaks[PEER])
        what = "at the larger depth" if memory is not None else "memory is measured on a GPU only"
        yield _mark(f"step {case}, peak memory beside Hugging Face", 0.7, memory, what)


def _of_teacher(rows: list[Row]) -> Iterator[Mark]:
    teacher = _of(rows, "teacher")
    cases = dict.fromkeys(row["case"] for row in teacher)
    if not cases:
        yield Mark("teacher", "", "part teacher gave no numbers", "not run")
    for case in cases:
        times = {row["name"]: row["ms"] for row in _of(teacher, "teacher", case)}
        if int(case.split(", ")[1].split()[0]) >= 8192:
            faster = _ratio(times.get("bf16"), times.get("fp8"))
            yield _mark(f"teacher layer {case}, FP8 times as fast as bf16", 1.4, faster, least=True)


def _of_gaps(rows: list[Row]) -> Iterator[Mark]:
    found = [row for row in _of(rows, "profile") if row["name"] == OURS and "gaps" in row]
    for row in found:
        yield _mark(f"profile {row['case']}, gaps between kernels, share of the step", 0.03, row["gaps"])
    if not found:
        yield _mark("profile, gaps between kernels, share of the step", 0.03, None, "part profile gave no numbers")


def table(marks: list[Mark], show: Callable[[str], None] = print) -> None:
    """Prints the marks as a Markdown table."""
    show("| mark | wanted | found | |\n|---|---|---|---|")
    for mark in marks:
        show(f"| {mark.name} | {mark.wanted} | {mark.found} | {mark.verdict} |")
