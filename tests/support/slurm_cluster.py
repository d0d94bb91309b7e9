"""A real Slurm of three nodes on this host, for as long as a test lasts. Needs root and Debian's slurm-wlm and munge.

Everything lies in a temporary folder, also the key; nothing under /etc is read or written. Three slurmd play the nodes:
they share the processors, the files and the name of the host. No cgroups: processes are found by their parents.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# SlurmdTimeout: a node that is silent for so long is down. cred_expire: a requeued job waits at least as long.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
JobRequeue=1
ReturnToService=1
SlurmdTimeout=10
KillWait=60
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=4000\n"


def why_not() -> str | None:
    """Why there can't be a cluster here."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "starting Slurm needs root"


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    folder: Path
    daemons: dict[str, psutil.Popen]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command of Slurm; return what it prints."""
        finished = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        return finished.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job, by its own names: JobState, NodeList, Restarts, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def num_idle(self) -> int:
        """Nodes that are ready and have no job; 0 before the controller answers."""
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        found = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)
        return found.stdout.split().count("idle")

    def break_node(self, name: str) -> None:
        """Kill a node as a power cut does: its daemon and all processes of its jobs die at once."""
        steps = [process.parent() for process in _with_environment("SLURMD_NODENAME", name)]
        of_steps = [process for process in steps if process is not None and process.name() == "slurmstepd"]
        doomed = {self.daemons[name], *(child for step in of_steps for child in step.children(recursive=True))}
        for process in [*of_steps, *doomed]:
            _send(process, signal.SIGKILL)
        self.daemons[name].wait()

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munged insists that others could reach its socket
    (folder / "state").mkdir()
    started = Cluster(folder, {})
    try:
        _start(started)
        yield started
    finally:
        _stop(started)
        shutil.rmtree(folder, ignore_errors=True)


def _start(cluster: Cluster) -> None:
    folder, host, ports = cluster.folder, socket.gethostname(), _free_ports(1 + len(NODES))
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
    text = CONFIGURATION.format(host=host, folder=folder, ports=ports)
    (folder / "slurm.conf").write_text("".join([*nodes, text]))
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    _daemon(cluster, "munged", "--foreground", "--force", f"--log-file={folder / 'munged.log'}", *options)
    _wait(cluster, "munged's socket", (folder / "munge.socket").exists)
    _daemon(cluster, "slurmctld", "-D")
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
        _daemon(cluster, name, "-D", "-N", name, program="slurmd")
    _wait(cluster, "idle nodes", lambda: cluster.num_idle() == len(NODES))


def _daemon(cluster: Cluster, name: str, *arguments: str, program: str | None = None) -> None:
    path = shutil.which(program or name, path=_PATH)
    assert path is not None
    with (cluster.folder / f"{name}.out.log").open("w") as output:
        cluster.daemons[name] = psutil.Popen(
            [path, *arguments], env=cluster.environment, stdout=output, stderr=subprocess.STDOUT
        )


def _wait(cluster: Cluster, what: str, condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what}\n{cluster.logs()}"
        time.sleep(0.1)


def _stop(cluster: Cluster) -> None:
    """End the jobs, the processes of their steps and the daemons, each by its process id."""
    if "n1" in cluster.daemons:
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, capture_output=True, timeout=180)
    left = _with_environment("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    for process in left:
        _send(process, signal.SIGKILL)
    for name in reversed(cluster.daemons):
        daemon = cluster.daemons[name]
        _send(daemon, signal.SIGTERM)
        try:
            daemon.wait(10)
        except psutil.TimeoutExpired:
            _send(daemon, signal.SIGKILL)
            daemon.wait()
    psutil.wait_procs(left, timeout=10)


def _with_environment(name: str, value: str) -> list[psutil.Process]:
    """Return processes with a variable in their environment, except this one and the daemons that it started."""
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports
