"""Who is lost, by what ranks say over a real store."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_capgap.distributed.watchdog import Watchdog, failed_collective
from tests.support.processes import environment, wait_for

WORLD = 3
TIMEOUT = 12.0  # a beat each 0.6 s, which a busy machine does not take from a thread


def places(watch: Watchdog) -> list[str]:
    """Where the ranks last said that they are."""
    return [beat.activity for beat in watch._read_heartbeats() or []]


@pytest.fixture
def watches() -> Iterator[list[Watchdog]]:
    """Of three ranks that live in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    all_of_them = [Watchdog(store, rank, WORLD, TIMEOUT) for rank in range(WORLD)]
    for rank, watch in enumerate(all_of_them):
        watch.activity = f"step {7 if rank else 8}"
    wait_for(lambda: places(all_of_them[0]) == ["step 8", "step 7", "step 7"], 60, "the first words")
    yield all_of_them
    for watch in all_of_them:
        watch.stop()


def silence(watch: Watchdog) -> None:
    """Ends a watch and the word that it may be saying."""

    def speaking() -> int:
        return sum(thread.name == "watch" for thread in threading.enumerate())

    before = speaking()
    watch.stop()
    wait_for(lambda: speaking() == before - 1, 60, "the end of the last word")


def test_the_rank_that_does_not_speak_is_named(watches: list[Watchdog]) -> None:
    silence(watches[1])
    assert watches[2].diagnose().startswith("rank 1 on ")
    assert watches[2].diagnose().endswith(", last heartbeat in step 7: dead or stalled")


def test_where_all_speak_the_one_elsewhere_is_named(watches: list[Watchdog]) -> None:
    said = watches[1].diagnose()
    assert said.startswith("all ranks are alive; not in the same activity: rank 0 on ") and said.endswith("in step 8")
    watches[0].activity = "step 7"
    wait_for(lambda: places(watches[1])[0] == "step 7", 60, "the next word")
    assert watches[1].diagnose() == "all ranks are alive and in step 7"


def test_a_long_silence_is_said_once(watches: list[Watchdog], capfd: pytest.CaptureFixture[str]) -> None:
    watches[2].stop()
    said: list[str] = []
    wait_for(lambda: said.append(capfd.readouterr().err) or "\n" in said[-1], 60, "the warning")
    heard = watches[0]._count
    wait_for(lambda: watches[0]._count >= heard + 3, 60, "three more looks at who speaks")
    (line,) = "".join([*said, capfd.readouterr().err]).splitlines()
    assert "capgap: warning: rank 2 on " in line and line.endswith("in step 7: no heartbeat for 6 s")


def test_a_rank_that_has_never_spoken_is_named() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    watch = Watchdog(store, 0, 2, TIMEOUT)
    assert watch.diagnose() == "rank 1: dead or stalled"
    watch.stop()


def test_a_store_that_is_gone(tmp_path: Path) -> None:
    keep = (
        "import torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True); print(s.port, flush=1); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", keep], env=environment(), **pipes)
    try:
        port = int(server.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        watch = Watchdog(store, 1, 2, TIMEOUT)
        wait_for(lambda: places(watch)[1:] == ["start-up"], 60, "the first word")
    finally:
        server.kill()
        server.wait()
    assert "rank 0, which hosts the job's store, does not respond" in watch.diagnose()
    watch.stop()


def test_only_waiting_for_others_is_explained() -> None:
    try:
        raise RuntimeError("a mistake of our own")
    except RuntimeError as error:
        assert failed_collective(error) is None
    try:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    except RuntimeError as error:
        assert failed_collective(error) == (
            '`raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")`, called by '
            f"test_only_waiting_for_others_is_explained (unit/test_watch.py:{error.__traceback__.tb_lineno})"
        )


def test_who_notices_later_hears_who_was_lost(watches: list[Watchdog], capfd: pytest.CaptureFixture[str]) -> None:
    silence(watches[1])
    verdict = watches[2].diagnose()
    wait_for(lambda: watches[0].diagnosis is not None, 60, "the verdict")
    watches[2].stop()  # leaves, and is silent too from now on
    try:
        raise RuntimeError("Connection closed by peer")
    except RuntimeError as error:
        watches[0].report(error)
    assert capfd.readouterr().err.endswith(f"Connection closed by peer; {verdict}\n")
