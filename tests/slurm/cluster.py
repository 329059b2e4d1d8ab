"""A real SLURM on this machine for tests: one controller and several nodes, each a slurmd.

The nodes are called by their addresses, names that resolve everywhere, so that nothing outside the cluster's folder is
touched. Each is in namespaces of its own where that may be. Elsewhere they are 127.0.0.1, 127.0.0.2 and so on, and
share the host's processes; one is then killed by killing all that belong to it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from megatron_capgap.distributed.process_group import reserved_port
from tests.slurm import namespaces
from tests.slurm.namespaces import Network
from tests.support import debian
from tests.support.debian import PATH
from tests.support.processes import environment, wait_for

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
LOOPBACK = "127.0.0."
KILL_WAIT = 10
"""Seconds that a step which was told to go has, before SLURM kills it."""
CONF = """\
ClusterName=tests
SlurmctldHost=localhost({head})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired: 120 s unless said otherwise, 5 s at least.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdTimeout=10
TCPTimeout=2
KillWait={kill_wait}
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{loopback}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""


def install() -> None:
    """Installs Debian's packages where they are missing.

    Raises:
        debian.Unavailable: they are missing and this user cannot install them.
    """
    debian.install(PACKAGES, PROGRAMS)


class Cluster:
    """A running SLURM.

    Args:
        folder: of its own, with a short name: unix sockets lie in it.
        nodes: how many.
        tasks: CPUs, and GPUs, that each node claims to have.
    """

    def __init__(self, folder: Path, nodes: int, tasks: int) -> None:
        self.folder = folder
        self._apart, self._network = namespaces.available(), None
        prefix = namespaces.PREFIX if self._apart else LOOPBACK
        self.nodes = [f"{prefix}{index + 1}" for index in range(nodes)]
        self._held = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure(tasks)

    def _configure(self, tasks: int) -> None:
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller, *ports = self._ports()
        host = socket.gethostname().split(".")[0]
        lines = []
        for node, port in zip(self.nodes, ports, strict=True):
            where = f"NodeHostname={node} NodeAddr={node}" if self._apart else f"NodeHostname={host} NodeAddr=127.0.0.1"
            lines.append(f"NodeName={node} {where} Port={port} CPUs={tasks} Gres=gpu:{tasks} State=UNKNOWN")
        text = CONF.format(
            head=namespaces.HEAD if self._apart else "127.0.0.1",
            port=controller,
            kill_wait=KILL_WAIT,
            user=psutil.Process().username(),
            folder=self.folder,
            nodes="\n".join(lines),
            loopback="" if self._apart else _stay_on_loopback(),
        )
        (self.folder / "slurm.conf").write_text(text)
        # What passes for a GPU is a file with a number.
        for gpu in range(tasks):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-{tasks - 1}]\n")

    def _ports(self) -> list[int]:
        """Of the controller and of each node. In networks of their own they are SLURM's usual ones, else from the
        kernel and held: SLURM's daemons set SO_REUSEADDR."""
        if self._apart:
            return [6817, *[6818] * len(self.nodes)]
        return [self._held.enter_context(reserved_port()) for _ in range(len(self.nodes) + 1)]

    def start(self) -> None:
        """Starts the daemons and waits until all nodes are there."""
        if self._apart:
            self._network = Network()
        munge = self.folder / "munge"
        files = {"key-file": munge / "key", "seed-file": munge / "seed", "log-file": munge / "log"}
        files |= {"socket": self.folder / "munge.sock", "pid-file": munge / "pid"}
        words = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
        self._daemon(*words, name="munged")
        wait_for(lambda: (self.folder / "munge.sock").exists(), 60, "munged's socket")
        self._daemon(*self._here("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")), name="slurmctld")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: all(self.state_of(node) == "IDLE" for node in self.nodes), 120, "the nodes", self.logs)

    def start_node(self, node: str) -> None:
        """Starts a node, or starts it again."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        words = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        if self._network is None:
            self._daemon(*words, name=node)
            return
        self._daemon(*namespaces.node(node, words), name=node)
        self._network.plug_in(self._daemons[node], self.nodes.index(node))

    def _here(self, *words: str) -> list[str]:
        """A command where the nodes can be reached."""
        return list(words) if self._network is None else self._network.inside(words)

    def _daemon(self, *words: str, name: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                words,
                env={"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends all jobs and daemons; leaves no process behind."""
        with suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--full", "--user", psutil.Process().username())
            wait_for(lambda: not self.run("squeue", "-h", "-t", "running,completing"), 20, "the end of all jobs")
        for node in self.nodes:
            self._kill_all_of(node)
        for name in ("slurmctld", "munged"):
            if name in self._daemons:
                self._daemons[name].terminate()
                self._daemons[name].wait(10)
        if self._network is not None:
            self._network.close()
        self._held.close()

    def kill_node(self, node: str) -> None:
        """A node is gone, with everything that ran on it; the controller learns at once what it would in 30 s."""
        self._kill_all_of(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def _kill_all_of(self, node: str) -> None:
        if self._apart:  # with its first process everything on it is gone
            if node in self._daemons:
                self._daemons[node].kill()
                self._daemons.pop(node).wait(10)
            return
        for _ in range(3):  # a slurmd that starts a job may be between two processes
            for pid in self.processes_of(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if node in self._daemons:
            self._daemons.pop(node).wait(10)

    def processes_of(self, node: str) -> list[int]:
        """Its slurmd and slurmstepds, which have its log open, and what they started for users."""
        log, conf = str(self.folder / f"slurmd-{node}.log"), str(self.folder / "slurm.conf")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                variables = process.environ()
                of_user = variables.get("SLURMD_NODENAME") == node and variables.get("SLURM_CONF") == conf
                if of_user or log in (file.path for file in process.open_files()):
                    found.append(process.pid)
        return found

    def ranks_on(self, node: str) -> list[int]:
        """The processes of megatron_capgap that run on a node."""
        found = []
        for pid in self.processes_of(node):
            with suppress(psutil.Error):
                if "megatron_capgap" in psutil.Process(pid).cmdline():
                    found.append(pid)
        return found

    def run(self, *words: str, variables: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What one of SLURM's commands prints; it must succeed."""
        env = {**environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **(variables or {})}
        if not self._apart:
            env["GLOO_SOCKET_IFNAME"] = "lo"
        # The interpreter of the tests is the jobs' too.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        done = subprocess.run(self._here(*words), env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise subprocess.SubprocessError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def host_of(self, node: str) -> str:
        """What a process on a node takes for the name of its machine."""
        return node if self._apart else socket.gethostname()

    def state_of(self, node: str) -> str:
        """A node's state: IDLE, MIXED, ALLOCATED, DOWN."""
        return self._field("State", "node", node).split("+")[0].rstrip("*")

    def job(self, number: str, field: str) -> str:
        """One field of a job, as `scontrol show job` names it."""
        return self._field(field, "job", number)

    def _field(self, field: str, kind: str, name: str) -> str:
        try:
            words = self.run("scontrol", "-o", "show", kind, name).split()
        except subprocess.SubprocessError:
            return ""
        return next((word.partition("=")[2] for word in words if word.startswith(f"{field}=")), "")

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        files = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def _stay_on_loopback() -> str:
    """SLURM binds to what this host's name resolves to, where it is told; useful only where that is loopback."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if address == "127.0.0.1" else ""


@contextmanager
def running(nodes: int = 4, tasks: int = 8) -> Iterator[Cluster]:
    """A cluster that is gone after the `with` block.

    Raises:
        Unavailable: it cannot be had here.
    """
    install()
    folder = Path(tempfile.mkdtemp(prefix="capgap-slurm-", dir="/tmp"))
    cluster = Cluster(folder, nodes, tasks)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
