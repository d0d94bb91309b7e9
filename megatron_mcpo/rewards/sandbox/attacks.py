"""List programs that try to leave the code sandbox, exhaust the machine or forge a verdict: data alone.

ATTACKS: name -> (kind, program). The kind says for which output the program would pass, which must not happen
(attack_run.py watches the host too):

escape   it prints ESCAPED, after a deed that must not succeed
secret   it prints what the file @CANARY@, the variable MCPO_SECRET or an inherited descriptor holds
forge    it prints a text that starts with "nonce-", which it can't know
assert   its function f returns a number which it can't know, for 7
method   its function f returns a text with a beginning which it can't know, for 7
twice    it prints ESCAPED when it is run for a second test

Replaced in programs: @CANARY@ (a file), @PACKAGE@, @HOME@, @PORT@ (TCP and UDP on 127.0.0.1), @SOCKET@ (a Unix socket's
path), @PARENT@ (the id of the process that scores), @VICTIM@ (of a process that sleeps).
"""

from megatron_mcpo.rewards.sandbox.exhaustion import CALL, ESCAPED, EXHAUSTION

_READING = {
    "read a file of the host": ("secret", "print(open('@CANARY@').read())"),
    "read it through libc": (
        "secret",
        "import ctypes\nc = ctypes.CDLL(None)\nfd = c.open(b'@CANARY@', 0)\nb = ctypes.create_string_buffer(99)\n"
        "assert c.read(fd, b, 99) > 0\nprint(b.value.decode())",
    ),
    "read it through a symlink": (
        "secret",
        "import os\nos.symlink('@CANARY@', '/tmp/link')\nprint(open('/tmp/link').read())",
    ),
    "read it through a hard link": (
        "secret",
        "import os\nos.link('@CANARY@', '/tmp/hard')\nprint(open('/tmp/hard').read())",
    ),
    "read it through /proc/1/root": ("secret", "print(open('/proc/1/root@CANARY@').read())"),
    "read it through /proc/self/cwd": ("secret", "print(open('/proc/self/cwd/../../../../..@CANARY@').read())"),
    "look for it in all folders": (
        "secret",
        "import os\nname = os.path.basename('@CANARY@')\nfor folder, _, files in os.walk('/'):\n"
        "    if name in files:\n        print(open(os.path.join(folder, name)).read())\n        break",
    ),
    "read inherited descriptors": (
        "secret",
        "import os\nfor fd in range(3, 1024):\n    try:\n        text = os.pread(fd, 4096, 0)\n"
        "    except OSError:\n        continue\n    if text.startswith(b'secret-'):\n        print(text.decode())\n"
        "        break",
    ),
    "find a descriptor left open": (
        "escape",
        "import os\nfound = []\nfor fd in range(3, 256):\n    try:\n        os.fstat(fd)\n    except OSError:\n"
        "        continue\n    found.append(fd)\nassert found" + ESCAPED,
    ),
    "read the environment": ("secret", "import os\nprint(os.environ['MCPO_SECRET'])"),
    "read another process's environment": (
        "secret",
        "text = open('/proc/@VICTIM@/environ').read()\nprint(text.split('MCPO_SECRET=')[1].split('\\0')[0])",
    ),
    "read init's environment": ("escape", "open('/proc/1/environ').read()" + ESCAPED),
    "read the parent's memory map": ("escape", "open('/proc/@PARENT@/maps').read()" + ESCAPED),
    "read the users": ("escape", "open('/etc/passwd').read()" + ESCAPED),
    "read the passwords": ("escape", "open('/etc/shadow').read()" + ESCAPED),
    "read the repository": ("escape", "open('@PACKAGE@/__init__.py').read()" + ESCAPED),
    "list the home": (
        "escape",
        "import os\nassert set(os.listdir('@HOME@')) - {'.pyenv', '.local'}" + ESCAPED,
    ),
    "read a disk": (
        "escape",
        "import os, stat\nfor major in (8, 252, 253, 254, 259):\n    "
        "os.mknod(f'/tmp/disk{major}', stat.S_IFBLK | 0o600, os.makedev(major, 0))\n"
        "    open(f'/tmp/disk{major}', 'rb').read(1)" + ESCAPED,
    ),
    "read kernel messages": (
        "escape",
        CALL + "b = ctypes.create_string_buffer(99)\ncall(103, 116, 3, b, 99)" + ESCAPED,
    ),
}

_WRITING = {
    "change a file of the host": ("escape", "open('@CANARY@', 'a').write('changed')" + ESCAPED),
    "delete a file of the host": ("escape", "import os\nos.remove('@CANARY@')" + ESCAPED),
    "write beside Python's modules": (
        "escape",
        "import os\nfolder = os.path.dirname(os.__file__)\nopen(folder + '/mcpo_attack.py', 'w').write('x')" + ESCAPED,
    ),
    "write into site-packages": (
        "escape",
        "import sysconfig\nopen(sysconfig.get_path('purelib') + '/mcpo_attack.pth', 'w').write('import os')" + ESCAPED,
    ),
    "write into the root folder": ("escape", "open('/mcpo_attack', 'w').write('x')" + ESCAPED),
    "write into shared memory": ("escape", "open('/dev/shm/mcpo_attack', 'w').write('x')" + ESCAPED),
    "leave a named shared memory": (
        "escape",
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory('mcpo_attack', create=True, size=4096)"
        + ESCAPED,
    ),
    "fill the disk": (
        "escape",
        "import os\nfor number in range(64):\n    with open(f'/tmp/mcpo_attack{number}', 'wb') as file:\n"
        "        file.write(bytes(2**22))" + ESCAPED,
    ),
    "write one huge file": (
        "escape",
        "with open('/tmp/mcpo_attack', 'wb') as file:\n    file.truncate(2**40)" + ESCAPED,
    ),
    "change how the kernel writes cores": (
        "escape",
        "open('/proc/sys/kernel/core_pattern', 'r+').write('|/tmp/x')" + ESCAPED,
    ),
}

_NETWORK = {
    "connect over TCP": (
        "escape",
        "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 2).sendall(b'x')" + ESCAPED,
    ),
    "send over UDP": (
        "escape",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))" + ESCAPED,
    ),
    "connect to a Unix socket": (
        "escape",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('@SOCKET@')" + ESCAPED,
    ),
    "connect to an abstract Unix socket": (
        "escape",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@SOCKET@')" + ESCAPED,
    ),
    "fetch over HTTP": (
        "escape",
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://127.0.0.1:@PORT@/', timeout=2).read()\n"
        "except ConnectionResetError:\n    pass" + ESCAPED,
    ),
    "ask for a name": ("escape", "import socket\nsocket.gethostbyname('example.com')" + ESCAPED),
    "wait for connections": ("escape", "import socket\nsocket.create_server(('0.0.0.0', 0))" + ESCAPED),
    "talk to the kernel over netlink": ("escape", "import socket\nsocket.socket(16, 3, 0).bind((0, 0))" + ESCAPED),
    "read packets": ("escape", "import socket\nsocket.socket(17, 3, 768)" + ESCAPED),
}

_PROCESSES = {
    "fork": ("escape", "import os\nif os.fork() == 0:\n    os._exit(0)\nos.wait()" + ESCAPED),
    "fork bomb": ("escape", "import os\nwhile True:\n    os.fork()"),
    "run a shell": (
        "escape",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)" + ESCAPED,
    ),
    "become a shell": ("escape", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    "processes by multiprocessing": (
        "escape",
        "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()\np.join()" + ESCAPED,
    ),
    "daemon that outlives": (
        "escape",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1)\n"
        "        open('@CANARY@', 'a').write('changed')\n        time.sleep(600)\n    os._exit(0)" + ESCAPED,
    ),
    "thread bomb": (
        "escape",
        "import threading, time\nthreading.stack_size(32768)\nfor _ in range(2000):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()" + ESCAPED,
    ),
    "thread that outlives": (
        "forge",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\nprint('nonce-')",
    ),
    "kill the parent": ("escape", "import os\nos.kill(@PARENT@, 9)" + ESCAPED),
    "kill another process": ("escape", "import os\nos.kill(@VICTIM@, 9)" + ESCAPED),
    "kill all processes": ("forge", "import os\nos.kill(-1, 9)\nprint('nonce-')"),
    "kill the process group": ("forge", "import os\nos.killpg(0, 9)"),
    "trace the parent": (
        "escape",
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, @PARENT@, None, None) == 0" + ESCAPED,
    ),
    "trace another process": (
        "escape",
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, None, None) == 0" + ESCAPED,
    ),
    "read the parent's memory": (
        "escape",
        CALL + "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "call(310, 270, @PARENT@, v, 1, v, 1, 0)" + ESCAPED,
    ),
    "take a descriptor of the parent": (
        "escape",
        CALL + "call(438, 438, call(434, 434, @PARENT@, 0), 0, 0)" + ESCAPED,
    ),
}

_KERNEL = {
    "become root": ("escape", "import os\nos.setuid(0)" + ESCAPED),
    "new user namespace": ("escape", "import os\nos.unshare(os.CLONE_NEWUSER)" + ESCAPED),
    "new user namespace by clone": ("escape", CALL + "call(56, 220, 0x10000011, 0, 0, 0, 0)" + ESCAPED),
    "mount": (
        "escape",
        "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0" + ESCAPED,
    ),
    "unmount": ("escape", "import ctypes\nassert ctypes.CDLL(None).umount2(b'/tmp', 2) == 0" + ESCAPED),
    "change the root": ("escape", "import os\nos.chroot('/tmp')" + ESCAPED),
    "open a file by its handle": ("escape", CALL + "call(304, 265, -100, ctypes.c_char_p(bytes(99)), 0)" + ESCAPED),
    "keyring": ("escape", CALL + "call(248, 217, b'user', b'mcpo', b'x', 1, -3)" + ESCAPED),
    "io_uring": ("escape", CALL + "call(425, 425, 1, ctypes.create_string_buffer(120))" + ESCAPED),
    "bpf": ("escape", CALL + "call(321, 280, 0, ctypes.create_string_buffer(120), 72)" + ESCAPED),
    "userfaultfd": ("escape", CALL + "call(323, 282, 1)" + ESCAPED),
    "performance counters": (
        "escape",
        CALL + "call(298, 241, ctypes.create_string_buffer(bytes([1, 0, 0, 0, 112]), 112), 0, -1, -1, 0)" + ESCAPED,
    ),
    "32-bit system calls": (
        "escape",
        "import ctypes, mmap, platform\nassert platform.machine() == 'x86_64'\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\naddress = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "assert ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0" + ESCAPED,
    ),
    "set the clock": (
        "escape",
        "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())" + ESCAPED,
    ),
    "set the host's name": ("escape", "import socket\nsocket.sethostname('attacked')" + ESCAPED),
    "raise a limit": (
        "escape",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))" + ESCAPED,
    ),
    "raise the priority": ("escape", "import os\nos.setpriority(os.PRIO_PROCESS, 0, -20)" + ESCAPED),
    "type on the terminal": (
        "escape",
        "import fcntl, termios\nfcntl.ioctl(open('/dev/tty', 'w'), termios.TIOCSTI, b'x')" + ESCAPED,
    ),
}

_FORGERY = {
    "guess and leave": ("forge", "import os\nprint('nonce-', flush=True)\nos._exit(0)"),
    "exit handler": ("forge", "import atexit, os\natexit.register(os._exit, 0)\nprint('nonce-')"),
    "look for what is expected in all objects": (
        "forge",
        "import gc, sys\nfor o in gc.get_objects():\n    for t in gc.get_referents(o):\n"
        "        if isinstance(t, str) and t.startswith('nonce-'):\n            print(t)\n            sys.exit()",
    ),
    "look for what is expected in the stack": (
        "forge",
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "        if 'nonce-' in str(v):\n            print('nonce-' + str(v).split('nonce-')[1][:32])\n"
        "            sys.exit()\n"
        "    frame = frame.f_back",
    ),
    "look for what is expected in the memory": (
        "forge",
        "import re\nmemory = open('/proc/self/mem', 'rb')\nfor line in open('/proc/self/maps'):\n"
        "    a, b = (int(x, 16) for x in line.split()[0].split('-'))\n    if 'rw' in line:\n        memory.seek(a)\n"
        "        found = re.search(rb'nonce-[0-9a-f]{32}', memory.read(b - a))\n        if found:\n"
        "            print(found[0].decode())\n            break",
    ),
    "look for what is expected in descriptors": (
        "forge",
        "import os, re\nfor fd in range(1024):\n    try:\n"
        "        found = re.search(rb'nonce-[0-9a-f]{32}', os.pread(fd, 2**20, 0))\n"
        "    except OSError:\n        continue\n    if found:\n        print(found[0].decode())\n        break",
    ),
    "keep the input for the next test": (
        "twice",
        "import os, sys\nif os.path.exists('/tmp/mcpo_attack'):\n    print('ESCAPED')\nelse:\n"
        "    open('/tmp/mcpo_attack', 'w').write(sys.stdin.read())\n    print('first')",
    ),
    "equals everything": (
        "assert",
        "class E:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef f(x):\n    return E()",
    ),
    "number that equals everything": (
        "assert",
        "class E(int):\n    __eq__ = lambda a, b: True\n    __index__ = lambda a: 1\n    __repr__ = lambda a: '1'\n"
        "    __hash__ = int.__hash__\ndef f(x):\n    return E(3)",
    ),
    "patched builtins": (
        "assert",
        "import builtins\nbuiltins.bool = lambda *a: True\nbuiltins.all = lambda *a: True\nbuiltins.exec = print\n"
        "builtins.isinstance = lambda *a: True\ndef f(x):\n    return True",
    ),
    "patched modules": (
        "assert",
        "import json, sys\njson.dumps = lambda *a, **k: '[[\"plain\", true]]'\nsys.modules['json'] = None\n"
        "sys.modules['__main__'].encode = lambda v: ['plain', True]\nsys.modules['__main__'].judge = lambda *a: True\n"
        "def f(x):\n    return True",
    ),
    "write the verdict": (
        "assert",
        "import os\ndef f(x):\n    for fd in range(64):\n        try:\n            os.write(fd, b'pass')\n"
        "        except OSError:\n            pass\n    os._exit(0)",
    ),
    "write the report": (
        "assert",
        "import os\ndef f(x):\n    for fd in range(64):\n        try:\n"
        "            os.write(fd, b'[[\"plain\", true]]')\n"
        "        except OSError:\n            pass\n    os._exit(0)",
    ),
    "have something rebuilt that equals everything": (
        "assert",
        "import os\ndef f(x):\n    for fd in range(64):\n        try:\n"
        '            os.write(fd, b\'[["rebuilt", "unittest.mock.ANY", []]]\')\n'
        "        except OSError:\n            pass\n    os._exit(0)",
    ),
    "leave with success": ("assert", "import os\nos._exit(0)"),
    "trace the harness": (
        "assert",
        "import sys\ndef spy(frame, event, value):\n    for name in list(frame.f_locals):\n"
        "        frame.f_locals[name] = True\n    return spy\nsys.settrace(spy)\nsys.setprofile(spy)\n"
        "frame = sys._getframe()\nwhile frame:\n    frame.f_trace = spy\n    frame = frame.f_back\n"
        "def f(x):\n    return True",
    ),
    "read the steps": (
        "assert",
        "import sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
        "        seen += str(frame.f_locals) + str(frame.f_globals)\n        frame = frame.f_back\n"
        "    import re\n    numbers = re.findall('[0-9]{12}', seen)\n    return int(numbers[0]) if numbers else 0",
    ),
    "pickle that runs code": (
        "assert",
        "import os\nclass P:\n    def __reduce__(self):\n        return os.remove, ('@CANARY@',)\n"
        "def f(x):\n    return P()",
    ),
    "huge value": ("assert", "def f(x):\n    return list(range(10**7))"),
    "deep value": ("assert", "def f(x):\n    v = 0\n    for _ in range(10**5):\n        v = [v]\n    return v"),
    "value without end": ("assert", "def f(x):\n    v = []\n    v.append(v)\n    return v"),
    "endless iterator": ("assert", "import itertools\ndef f(x):\n    return itertools.count()"),
    "value that is slow to hash": ("assert", "def f(x):\n    return {i * (2**61 - 1) for i in range(50_000)}"),
    "object whose methods say yes": (
        "method",
        "class E:\n    def startswith(self, *a):\n        return True\n    def __getattr__(self, name):\n"
        "        return lambda *a, **k: True\ndef f(x):\n    return E()",
    ),
    "text whose methods say yes": (
        "method",
        "class E(str):\n    def startswith(self, *a):\n        return True\ndef f(x):\n    return E('x')",
    ),
    "text that is read from the test": (
        "method",
        "import re, sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
        "        seen += str(frame.f_locals) + str(frame.f_globals)\n        frame = frame.f_back\n"
        "    found = re.findall('[0-9a-f]{32}', seen)\n    return found[0] if found else ''",
    ),
    "exception that resists": (
        "assert",
        "class E(BaseException):\n    def __del__(self):\n        while True:\n            pass\n"
        "def f(x):\n    raise E",
    ),
}

ATTACKS: dict[str, tuple[str, str]] = {
    **_READING, **_WRITING, **_NETWORK, **_PROCESSES, **_KERNEL, **EXHAUSTION, **_FORGERY,
}  # fmt: skip

HARMLESS = (
    "read a file of the host",
    "read it through libc",
    "read another process's environment",
    "read the users",
    "read the repository",
    "connect over TCP",
    "send over UDP",
    "connect to a Unix socket",
    "connect to an abstract Unix socket",
    "fork",
    "run a shell",
)
"""Attacks that do no harm where they succeed: with CPython that has limits alone they must, or nothing is tested."""
