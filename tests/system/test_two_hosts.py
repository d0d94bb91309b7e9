"""Two hosts in one: network namespaces with a cable between them, each with its own name and its own torchrun.

Not covered here: GPUs and their networks, a cable that breaks, hosts with several networks.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.program import train_forked, write_config
from tests.support.resumed_runs import figures

SETTINGS = ("--run.steps", "2", "--parallel.data", "2")
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
# The name and the names of the others are the host's own, for this process and those that it starts.
AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def two_hosts() -> Iterator[dict[str, str]]:
    """Name of the namespace by name of the host. Raises CalledProcessError where this can't be done."""
    namespaces = {host: f"mcpo-{os.getpid()}-{host}" for host in ADDRESSES}
    with ExitStack() as undo:
        for namespace in namespaces.values():
            ip("netns", "add", namespace)
            undo.callback(ip, "netns", "delete", namespace)
        first, second = namespaces.values()
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host, namespace in namespaces.items():
            ip("-n", namespace, "address", "add", f"{ADDRESSES[host]}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", namespace, "link", "set", device, "up")
            subprocess.run(["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", "true"], check=True)
        yield namespaces


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root, ip and unshare")
    with ExitStack() as stack:
        try:
            namespaces = stack.enter_context(two_hosts())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error} {error.stderr}")
        yield namespaces


def start(host: str, namespace: str, config: Path, names: Path) -> subprocess.Popen[str]:
    prefix = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--mount", "sh", "-c", AS_HOST, "sh", host, names]
    variables = {
        "NODES": "2",
        "RANKS": "1",
        "HEAD": "host-a:29500",
        "LOGS": str(config.parent / f"logs-{host}"),
        "PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": "cable",
    }
    return subprocess.Popen(
        [*prefix, ROOT / "examples" / "launch" / "torchrun.sh", config, *SETTINGS],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_hosts_do_what_one_does(model: Path, tmp_path: Path, hosts: dict[str, str]) -> None:
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items()))
    config = write_config(model, folders["two"])
    started = [start(host, namespace, config, names) for host, namespace in hosts.items()]
    try:
        printed = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.terminate()
            process.wait(60)
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)[-5000:]
    finished = train_forked(write_config(model, folders["one"]), *SETTINGS, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert figures(folders["two"] / "runs" / "tiny") == figures(folders["one"] / "runs" / "tiny")
