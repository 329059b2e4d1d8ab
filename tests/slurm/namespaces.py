"""Nodes that are machines of their own as far as a kernel goes: processes, network and host name apart.

Every node has a network card on a bridge, which lives in a network that nothing outside reaches. A node whose first
process is killed is gone at once, with all that ran on it, and without a word to those that were connected with it.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence

PREFIX = "10.213.7."
HEAD = f"{PREFIX}254"
"""Where the controller is, and all commands."""
_OWN = ("unshare", "--net", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
# The first process of a node: waits for its network card, starts the rest and reaps what others leave behind.
_NODE = """\
hostname "$1"; ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
ip addr add "$1/24" dev eth0; shift; "$@"; exit $?"""


def available() -> bool:
    """Whether this user may make them here."""
    words = [*_OWN, "ip", "link", "add", "br0", "type", "bridge"]
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return subprocess.run(words, capture_output=True).returncode == 0


def node(address: str, words: Sequence[str]) -> list[str]:
    """The command that starts words on a node; it ends when they do, and they end when it is killed."""
    return [*_OWN, "bash", "-c", _NODE, "node", address, *words]


class Network:
    """The bridge between nodes; is there until `close`."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL)
        _wait_for_network_of(self._holder)
        for words in ("link set lo up", "link add br0 type bridge", f"addr add {HEAD}/24 dev br0", "link set br0 up"):
            self._ip(words)

    def inside(self, words: Sequence[str]) -> list[str]:
        """The command that runs words in this network."""
        return ["nsenter", "--net", "-t", str(self._holder.pid), "--", *words]

    def plug_in(self, started: subprocess.Popen[bytes], number: int) -> None:
        """Gives a node that was started by `node` its network card, in the place of a dead one's."""
        _wait_for_network_of(started)
        subprocess.run(self.inside(["ip", "link", "del", f"v{number}"]), capture_output=True)
        self._ip(f"link add v{number} type veth peer name eth0 netns {started.pid}")
        self._ip(f"link set v{number} master br0 up")

    def close(self) -> None:
        """Nothing is left of it."""
        self._holder.kill()
        self._holder.wait()

    def _ip(self, words: str) -> None:
        subprocess.run(self.inside(["ip", *words.split()]), check=True, capture_output=True)


def _wait_for_network_of(process: subprocess.Popen[bytes]) -> None:
    """Until a process has left this one's network."""
    end = time.monotonic() + 10
    while os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        assert time.monotonic() < end and process.poll() is None, "no network of its own"
        time.sleep(0.02)
