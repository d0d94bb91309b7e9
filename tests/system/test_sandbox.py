"""The code sandbox: attacks on every level that this machine allows, programs right and wrong, divided unit tests.

Not covered: flaws of the kernel, of bubblewrap and of the interpreter themselves; aarch64, whose filter is only built.
"""

import ast
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_mcpo.rewards.code import extract_code, score
from megatron_mcpo.rewards.code_tests import parse_tests
from megatron_mcpo.rewards.sandbox import attack_run, bubblewrap, levels, process, seccomp
from megatron_mcpo.rewards.sandbox.attacks import ATTACKS, HARMLESS
from megatron_mcpo.rewards.sandbox.interpreter import Unsupported
from megatron_mcpo.rewards.sandbox.levels import Level, available_level
from tests.support.paths import ROOT
from tests.support.sandbox import STACK, allowed, asserts

type Attack = Callable[[str, Level], attack_run.Result]

_hosts: list[attack_run.Host] = []
"""In the process that is attacked: what is attacked there."""


@pytest.fixture(scope="module")
def attack() -> Iterator[Attack]:
    """Attacks in a process of their own: what it starts is watched, and this process has what other tests started."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_enter) as pool:
        yield lambda name, level: pool.submit(_attack, name, ATTACKS[name], level).result(timeout=120)
        pool.submit(_leave).result(timeout=180)


def _enter() -> None:
    _hosts.append(attack_run.Host().__enter__())


def _attack(name: str, program: tuple[str, str], level: Level) -> attack_run.Result:
    ATTACKS[name] = program
    result = attack_run.attack(name, _hosts[0], level)
    for child in psutil.Process().children(recursive=True):
        if child.pid != _hosts[0].victim.pid and child.name() != "monty":
            child.kill()
    return result


def _leave() -> None:
    _hosts.pop().__exit__()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("level", ["bubblewrap", "interpreter"])
def test_attack_is_contained(attack: Attack, level: Level, name: str) -> None:
    result = attack(name, allowed(level))
    assert result.problems == (), result


@pytest.mark.parametrize("name", HARMLESS)
def test_attack_succeeds_where_there_is_no_sandbox(attack: Attack, name: str) -> None:
    result = attack(name, "insecure")
    assert "the program passed its tests" in result.problems, "an attack that can't succeed tests nothing"


@pytest.mark.parametrize(
    ("deed", "problem"),
    [
        ("open('@CANARY@', 'a').write('x')", "file of the host was changed"),
        ("import os; os.kill(@VICTIM@, 9)", "another process was ended"),
        ("open('/dev/shm/mcpo_attack', 'w')", "/dev/shm/mcpo_attack was left"),
        ("import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(60)", "processes were left"),
    ],
)
def test_damage_to_the_host_is_noticed(
    monkeypatch: pytest.MonkeyPatch, attack: Attack, deed: str, problem: str
) -> None:
    monkeypatch.setitem(ATTACKS, "deed", ("escape", deed))
    result = attack("deed", "insecure")
    assert any(problem in text for text in result.problems), result


def test_attacks_are_programs() -> None:
    assert len(ATTACKS) >= 40 and set(HARMLESS) <= set(ATTACKS)
    for name, (_, program) in ATTACKS.items():
        if name != "deep nesting of source":
            ast.parse(program.replace("@PORT@", "1").replace("@PARENT@", "1").replace("@VICTIM@", "1"))


def test_tool_counts_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_mcpo", "sandbox", "check", "--level", "insecure", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=tmp_path, check=False)
    said = json.loads(done.stdout)
    assert said["level"] == "insecure" and said["attacks"] == len(HARMLESS) > said["contained"]
    assert done.returncode == 1


FIBONACCI = "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
WORDS = "from collections import Counter\ndef words(t):\n    return Counter(t.split())\n"
SUM = "n = int(input())\nprint(sum(int(input()) for _ in range(n)))\n"
ECHO = "while True:\n    line = input()\n    if line == 'end':\n        break\n    print(line[::-1] + '  ')\nprint()\n"
SUM_TESTS = [{"input": "2\n3\n4\n", "output": "7\n"}, {"input": "0\n", "output": "0"}]


BOTH = [{"input": "", "output": "1"}, *asserts("assert f() == 1")]

# Program, tests, the verdict: the same at every level.
SOLUTIONS: dict[str, tuple[str, list[dict[str, str]], float]] = {
    "numbers": (FIBONACCI, asserts("assert fib(10) == 55", "assert fib(0) == 0 and fib(1) == 1"), 1.0),
    "one of two tests": (FIBONACCI, asserts("assert fib(10) == 55", "assert fib(0) == 1"), 0.0),
    "large numbers": (FIBONACCI, asserts("assert fib(100) == 354224848179261915075"), 1.0),
    "types": (WORDS, asserts("assert words('a b a') == {'a': 2, 'b': 1}"), 1.0),
    "sets and tuples": ("def f(x):\n    return {x}, (x, [x])", asserts("assert f(1) == ({1}, (1, [1]))"), 1.0),
    "list is no tuple": ("def f(x):\n    return [x]", asserts("assert f(1) == (1,)"), 0.0),
    "nothing returned": ("def f(x):\n    x + 1", asserts("assert f(1) == 2"), 0.0),
    "builtins around it": (FIBONACCI, asserts("assert sorted({fib(3), fib(1)}) == [1, 2]"), 1.0),
    "near a number": ("def f():\n    return 0.1 + 0.2", asserts("import math\nassert math.isclose(f(), 0.3)"), 1.0),
    "not near it": ("def f():\n    return 0.31", asserts("assert abs(f() - 0.3) < 1e-6"), 0.0),
    "module not imported": ("def f():\n    return 0.1 + 0.2", asserts("assert math.isclose(f(), 0.3)"), 1.0),
    "objects": (STACK, asserts("s = Stack()\ns.push(3).push(4)\nassert s.pop() == 4 and len(s.items) == 1"), 1.0),
    "in place": ("def f(x):\n    x.sort()", asserts("x = [3, 1]\nf(x)\nassert x == [1, 3]"), 1.0),
    "truth": ("def even(n):\n    return n % 2 == 0", asserts("assert even(4)", "assert not even(3)"), 1.0),
    "half a truth": ("def even(n):\n    return True", asserts("assert even(4)", "assert not even(3)"), 0.0),
    "raises": ("def f(x):\n    return x / 0", asserts("assert f(1) == 1"), 0.0),
    "main guard": (
        "def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input())))\n",
        [{"input": "3", "output": "3"}, *asserts("assert f(4) == 4")],
        1.0,
    ),
    "other name": ("def g(x):\n    return x", asserts("assert f(1) == 1"), 0.0),
    "prints too": ("print('hello')\ndef f(x):\n    print(x)\n    return x", asserts("assert f(1) == 1"), 1.0),
    "no Python": ("The answer is f(1) = 1.", asserts("assert f(1) == 1"), 0.0),
    "empty": ("", asserts("assert f(1) == 1"), 0.0),
    "standard input": (SUM, SUM_TESTS, 1.0),
    "wrong output": (SUM.replace("sum(", "1 + sum("), SUM_TESTS, 0.0),
    "right and more": (SUM + "print('bye')", SUM_TESTS, 0.0),
    "outer blanks don't count": (ECHO, [{"input": "abc\n  xy\nend\n", "output": "cba\nyx\n"}], 1.0),
    "inner blanks count": ("print('a  b')", [{"input": "", "output": "a b"}], 0.0),
    "right, then raises": (SUM + "1 / 0", SUM_TESTS, 0.0),
    "both kinds": ("def f():\n    return 1\nprint(f())", BOTH, 1.0),
    "both kinds, one wrong": ("def f():\n    return 1", BOTH, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLUTIONS)
@pytest.mark.parametrize("level", ["bubblewrap", "interpreter", "insecure"])
def test_right_programs_pass_and_wrong_ones_fail(level: Level, name: str) -> None:
    program, tests, expected = SOLUTIONS[name]
    answer = f"I think this does it:\n\n```python\n{program}\n```\n\nIt runs in linear time."
    assert score({"tests": tests}, answer, level=allowed(level), seconds=30.0) == expected


# What only CPython can run.
CPYTHON = {
    "generator": ("def f(n):\n    yield from range(n)", asserts("assert list(f(3)) == [0, 1, 2]"), 1.0),
    "heap": ("import heapq\ndef f(x):\n    return heapq.nsmallest(1, x)", asserts("assert f([3, 1]) == [1]"), 1.0),
    "inheritance": ("class A:\n    x = 1\nclass B(A):\n    pass\nf = lambda: B().x", asserts("assert f() == 1"), 1.0),
    "order of objects": (
        "class P:\n    def __init__(self, x):\n        self.x = x\n"
        "    def __lt__(self, o):\n        return self.x < o.x\n"
        "def f():\n    return min(P(2), P(1)).x",
        asserts("assert f() == 1"),
        1.0,
    ),
    "length of objects": (
        "class P:\n    def __len__(self):\n        return 0\ndef f():\n    return 1 if P() else 2",
        asserts("assert f() == 2"),
        1.0,
    ),
    "first that fits": ("def f(x):\n    return next((i for i in x), None)", asserts("assert f([1, 2]) == 1"), 1.0),
    "replacement by function": (
        "import re\ndef f(t):\n    return re.sub('[0-9]', lambda m: str(int(m[0]) + 1), t)",
        asserts("assert f('a1') == 'a2'"),
        1.0,
    ),
    "builtin": ("def f(x):\n    return callable(x)", asserts("assert f(print)"), 1.0),
    "sys.stdin": ("import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))", SUM_TESTS, 1.0),
    "sys.exit": (SUM + "import sys\nsys.exit()", SUM_TESTS, 1.0),
    "with": ("with open('/tmp/x', 'w') as f:\n    f.write('1')\nprint(open('/tmp/x').read())", BOTH[:1], 1.0),
    "thread": (
        "import sys, threading\nsys.setrecursionlimit(10**5)\nthreading.stack_size(2**26)\n"
        f"def main():\n    {SUM.replace(chr(10), chr(10) + '    ')}\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
        SUM_TESTS,
        1.0,
    ),
    "class of data": (
        "from dataclasses import dataclass\nfrom enum import Enum\nclass C(Enum):\n    A = 1\n"
        "@dataclass\nclass P:\n    x: int\n"
        "def f(x):\n    return P(x), C.A",
        asserts("assert f(3)[0].x == 3"),
        1.0,
    ),
    "huge number": ("def f(n):\n    return 10**n", asserts("assert f(6000) == 10**6000"), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CPYTHON)
def test_the_whole_of_python_runs_in_bubblewrap(name: str) -> None:
    program, tests, expected = CPYTHON[name]
    assert score({"tests": tests}, program, level=allowed("bubblewrap"), seconds=30.0) == expected


@pytest.mark.parametrize("name", sorted(CPYTHON.keys() - {"with", "huge number"}))
def test_what_the_interpreter_lacks_is_an_error_and_no_verdict(name: str) -> None:
    program, tests, _ = CPYTHON[name]
    with pytest.raises(Unsupported, match="interpreter can't run this program"):
        score({"tests": tests}, program, level=allowed("interpreter"))


@pytest.mark.parametrize(
    "program", ["import no_such_module", "no_such_name", "'x'.no_such_method()", "def f(:", "raise NameError('x')"]
)
def test_faults_of_the_program_are_wrong_in_the_interpreter_too(program: str) -> None:
    assert score({"tests": SUM_TESTS}, program, level=allowed("interpreter")) == 0.0


def test_the_last_block_of_python_is_the_program() -> None:
    text = "```python\nfirst\n```\nthen\n```\nno language\n```\n```py\nlast\n```\n```sh\nls\n```"
    assert extract_code(text) == "last\n"
    assert extract_code("def f(): pass") == "def f(): pass"
    assert extract_code("```python\nnever closed") == "```python\nnever closed"


def test_expected_values_are_not_given_to_the_program() -> None:
    _, tests = parse_tests({"tests": asserts("import math\nassert math.isclose(f(2), 17.25)", "assert g(3)[0] == 18")})
    assert tests.steps == [["do", "import math"], ["value", "f(2)"], ["value", "g(3)[0]"]]
    assert tests.checks == ["math.isclose(value_0, 17.25)", "value_1 == 18"]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "at least one test"),
        ([], "at least one test"),
        ([{"input": "1"}], r"tests\[0\]: must be"),
        ([{"input": 1, "output": "1"}], r"tests\[0\]: must be"),
        (asserts("assert f(1) == 1", "assert f("), r"tests\[1\]: .*never closed"),
        (asserts("f(1)"), "must have an assert"),
        (asserts("for i in range(3):\n    assert f(i)"), "at the top level"),
        (asserts("assert sum([1, 2]) == 3"), "must call what the program defines"),
        (asserts("assert [f(x) for x in (1, 2)] == [1, 2]"), "loop's variable"),
        (asserts("want = 3\nassert f(1) == want"), "write it into the assert"),
        (asserts("want = 3\nassert len(f(1)) == len(want)"), "write it into the assert"),
        (asserts("want = 3\nassert not f(1) - want"), "write it into the assert"),
        (asserts("assert P(1) == P(1)"), r"both sides of 'P\(1\) == P\(1\)'"),
        (asserts("assert f(1) == 1 != [g(1)]", "assert [f(1)] != (g(1), 2)"), r"tests\[1\]: both sides"),
        (asserts("assert add(Fraction(1, 2)) == Fraction(1, 2)"), "both sides"),
        (asserts("assert all(p.x == 1 for p in f())"), "no plain data has an attribute 'x'"),
        (asserts("assert sorted(f(), key=lambda p: p.x) == []"), "no plain data has an attribute 'x'"),
        (asserts("assert (y := f(1)) == y"), "must not have :="),
        (asserts("from math import *\nassert isclose(f(1), 2)"), "import them by name"),
        (asserts("assert " + "-" * 100_000 + "f(1)"), r"tests\[0\]"),
    ],
)
def test_tests_that_cannot_be_used_are_refused(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score({"tests": tests}, "def f(x): return x", level="insecure")


def test_a_sandbox_that_fails_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    level = allowed("bubblewrap")
    monkeypatch.setattr(bubblewrap, "usable", lambda: Path("/bin/false"))
    with pytest.raises(process.SandboxError, match="bubblewrap"):
        score({"tests": SUM_TESTS}, SUM, level=level)


def test_no_level_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "_problem", lambda level: f"no {level} here")
    for setting in ("auto", "bubblewrap", "interpreter"):
        with pytest.raises(ValueError, match=r"can't be run safely.*no .* here.*user namespaces.*insecure"):
            available_level(setting)
    monkeypatch.setattr(levels, "_problem", lambda level: None if level == "interpreter" else "no namespaces")
    assert available_level("auto") == "interpreter"


def test_a_level_that_reaches_the_host_is_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed("bubblewrap")
    monkeypatch.setattr(levels, "_PROBE", levels._PROBE.replace('open("/probe", "w")', 'open("/tmp/probe", "w")'))
    levels._problem.cache_clear()
    try:
        with pytest.raises(ValueError, match="within reach: the root folder"):
            available_level("bubblewrap")
    finally:
        levels._problem.cache_clear()


@pytest.mark.parametrize(
    ("level", "stop"),
    [
        ("bubblewrap", signal.SIGKILL),
        ("bubblewrap", signal.SIGALRM),
        ("insecure", signal.SIGKILL),
        ("interpreter", None),  # it ends with the process group of its parent, or when its time is up
    ],
)
def test_programs_end_with_the_process_that_started_them(
    level: Level, stop: signal.Signals | None, tmp_path: Path
) -> None:
    allowed(level)
    code = (
        "import sys\nfrom megatron_mcpo.rewards.code import score\nprint('up', flush=True)\n"
        f"score({{'tests': [{{'input': '', 'output': '1'}}]}}, 'while True: pass', level={level!r}, seconds=300.0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    scorer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        assert scorer.stdout is not None and scorer.stdout.readline() == b"up\n"
        running = _burning(scorer.pid)
    finally:
        if stop is None:
            os.killpg(scorer.pid, signal.SIGKILL)
        else:
            scorer.send_signal(stop)
        scorer.wait()
        scorer.stdout.close()
    _, alive = psutil.wait_procs(running, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def _burning(pid: int) -> list[psutil.Process]:
    """Return the descendants of a process, once one of them computes."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = psutil.Process(pid).children(recursive=True)
        if any(map(_computes, found)):
            return found
        time.sleep(0.1)
    raise TimeoutError("the program did not start")


def _computes(process: psutil.Process) -> bool:
    try:
        return sum(process.cpu_times()[:2]) > 0.5
    except psutil.NoSuchProcess:  # a process of the start that has ended since
        return False


@pytest.mark.parametrize(("number", "stopped"), [(4000, ""), (10**7, "files")])
def test_files_without_content_have_a_limit_too(number: int, stopped: str) -> None:
    code = f"import os\nfor number in range({number}):\n    os.close(os.open(f'/tmp/{{number}}', os.O_CREAT))\nprint(7)"
    job = {"mode": "program", "code": code}
    allowed("bubblewrap")
    outcome = process.run(job, b"", level="bubblewrap", seconds=60.0)
    assert outcome.stopped == stopped and (outcome.output == b"7\n") == (not stopped)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_refuses_and_allows(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    x86 = machine == "x86_64"
    numbers = {"ptrace": 101 if x86 else 117, "socket": 41 if x86 else 198, "read": 0 if x86 else 63}
    clone = 56 if x86 else 220
    of_kernel = {"setxattr": 188 if x86 else 5, "io_setup": 206 if x86 else 0, "inotify_init1": 294 if x86 else 26}
    arch = 0xC000003E if x86 else 0xC00000B7
    assert _verdict(arch, numbers["read"]) == 0x7FFF0000
    assert _verdict(arch, numbers["ptrace"]) == _verdict(arch, numbers["socket"]) == 0x00050001
    assert {_verdict(arch, call) for call in of_kernel.values()} == {0x00050001}
    assert _verdict(arch, 435) == 0x00050000 | 38  # clone3: not implemented
    assert _verdict(arch, clone, 0x003D0F00) == 0x7FFF0000  # a thread
    assert _verdict(arch, clone, 0x00000011) == 0x00050001  # fork
    assert _verdict(arch, clone, 0x10010000) == 0x00050001  # a thread in a new user namespace
    assert _verdict(0x40000003, numbers["read"]) == 0x80000000  # i386
    assert _verdict(arch, numbers["read"] | 0x40000000) == 0x80000000


def test_filter_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.filter_bytes()


def _verdict(arch: int, number: int, argument: int = 0) -> int:
    """Run the filter as the kernel does (classic BPF over struct seccomp_data)."""
    data = struct.pack("=IIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    program = list(struct.iter_unpack("=HBBI", seccomp.filter_bytes()))
    counter, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = program[counter]
        counter += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, operand)[0]
            continue
        holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[code]
        counter += if_true if holds else if_false
