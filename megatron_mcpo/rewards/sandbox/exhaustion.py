"""List programs that exhaust the machine: its memory, its kernel's memory, its time, its output. Data alone.

attacks.py says what the kinds mean.
"""

CALL = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
def call(x86_64, aarch64, *arguments):
    number = x86_64 if platform.machine() == "x86_64" else aarch64
    result = libc.syscall(ctypes.c_long(number), *arguments)
    assert result >= 0, ctypes.get_errno()
    return result
"""
"""Defines `call`, which makes a system call by its numbers on x86_64 and on aarch64."""

ESCAPED = "\nprint('ESCAPED')\n"

EXHAUSTION = {
    "memory bomb": (
        "escape",
        "data = bytearray(3 * 2**30)\nfor i in range(0, len(data), 4096):\n    data[i] = 1" + ESCAPED,
    ),
    "memory bomb of small objects": ("escape", "data = []\nwhile True:\n    data.append([0] * 1000)"),
    "memory that is mapped": (
        "escape",
        "import mmap\nm = mmap.mmap(-1, 3 * 2**30)\nfor i in range(0, len(m), 4096):\n    m[i] = 1" + ESCAPED,
    ),
    "memory in files without a name": (
        "escape",
        "import os\nfor _ in range(40):\n    os.write(os.memfd_create('x'), bytes(2**23))" + ESCAPED,
    ),
    "memory of System V": (
        "escape",
        CALL + "call(29, 194, 0, 2**28, 0o1600)" + ESCAPED,
    ),
    "many open files": ("escape", "files = [open('/dev/null') for _ in range(2000)]" + ESCAPED),
    "endless loop": ("escape", "while True:\n    pass"),
    "endless sleep": ("escape", "import time\ntime.sleep(600)" + ESCAPED),
    "endless power": ("escape", "print(9**9**9)"),
    "endless regular expression": ("escape", "import re\nwhile True:\n    re.match('(a|aa)+$', 'a' * 60 + 'b')"),
    "endless text of a number": (
        "escape",
        "import sys\nsys.set_int_max_str_digits(0)\nn = 7 ** 10**7\nwhile True:\n    str(n)",
    ),
    "deaf to signals": (
        "escape",
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    ),
    "deep recursion": (
        "escape",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nclass C:\n    def __getattr__(self, name):\n"
        "        return getattr(self, name + 'x')\nC().x",
    ),
    "deep nesting of source": ("escape", "(" * 10_000 + ")" * 10_000),
    "flood of output": ("escape", "while True:\n    print('x' * 1000)"),
    "flood of errors": ("escape", "import sys\nwhile True:\n    print('x' * 1000, file=sys.stderr)"),
    "closed output": ("escape", "import os, time\nos.close(1)\ntime.sleep(600)"),
    "memory in extended attributes": (
        "escape",
        "import os\nopen('/tmp/file', 'w').close()\nfor number in range(2000):\n"
        "    os.setxattr('/tmp/file', f'user.{number}', bytes(60_000))" + ESCAPED,
    ),
    "memory in empty files": (
        "escape",
        "import os\nfor number in range(60_000):\n    os.close(os.open(f'/tmp/{number}', os.O_CREAT))" + ESCAPED,
    ),
    "memory in folders": (
        "escape",
        "import os\nfor number in range(60_000):\n    os.mkdir(f'/tmp/{number}')" + ESCAPED,
    ),
    "memory in names of one file": (
        "escape",
        "import os\nopen('/tmp/0', 'w').close()\nfor number in range(1, 60_000):\n"
        "    os.link('/tmp/0', f'/tmp/{number:0200}')" + ESCAPED,
    ),
    "files of many threads": (
        "escape",
        "import os, threading\ndef make(part):\n    os.mkdir(f'/tmp/{part}')\n    for number in range(15_000):\n"
        "        os.symlink('x' * 100, f'/tmp/{part}/{number}')\n"
        "threads = [threading.Thread(target=make, args=(part,)) for part in range(4)]\n"
        "for thread in threads:\n    thread.start()\nfor thread in threads:\n    thread.join()\n"
        "assert os.path.lexists('/tmp/3/14999')" + ESCAPED,
    ),
    "the host's asynchronous requests": (
        "escape",
        CALL + "call(206, 0, 1, ctypes.byref(ctypes.c_ulong(0)))" + ESCAPED,
    ),
    "the host's file watches": ("escape", CALL + "call(294, 26, 0)" + ESCAPED),
    "memory in rules of Landlock": (
        "escape",
        CALL + "call(444, 444, (ctypes.c_uint64 * 1)(1), ctypes.c_size_t(8), 0)" + ESCAPED,
    ),
    "memory in buffers of sockets": (
        "escape",
        "import socket\na, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)" + ESCAPED,
    ),
    "memory in signals that wait": (
        "escape",
        CALL + "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {40})\n"
        "information = (ctypes.c_int * 32)(40, 0, -1)\nfor _ in range(10_000):\n"
        "    call(129, 138, os.getpid(), 40, information)" + ESCAPED,
    ),
    "memory in timers": (
        "escape",
        CALL + "for _ in range(10_000):\n    call(222, 107, 1, None, ctypes.byref(ctypes.c_int()))" + ESCAPED,
    ),
}
