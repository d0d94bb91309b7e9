"""Add the imports that LeetCode's starter code leaves out: there they are made before the program runs."""

import ast
import builtins
import re

_NAMES_OF = {
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "dataclasses": "dataclass",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile zip_longest",
    "math": "ceil comb dist factorial floor gcd inf isqrt lcm log log10 log2 perm pi prod sqrt",
    "operator": "attrgetter itemgetter",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List Mapping NamedTuple "
    "Optional Sequence Set Tuple Union",
}
_MODULES = "bisect collections copy datetime functools heapq itertools json math operator random re string sys typing"
_NODES = {
    "ListNode": ("val=0, next=None", "self.val = val; self.next = next"),
    "TreeNode": ("val=0, left=None, right=None", "self.val = val; self.left = left; self.right = right"),
}

_STATEMENTS = {name: f"from {module} import {name}" for module, names in _NAMES_OF.items() for name in names.split()}
_STATEMENTS |= {module: f"import {module}" for module in _MODULES.split()}
_STATEMENTS |= {
    name: f"class {name}:\n    def __init__(self, {parameters}):\n        {body}"
    for name, (parameters, body) in _NODES.items()
}
"""What each name needs, where the program uses it and binds it nowhere."""


def with_prelude(code: str, function: str | None) -> str:
    """Return a program with the imports that it takes for granted, where it is written as LeetCode's are.

    function: the one that the item's tests call, None where they name none: the program then must have a class
        Solution.
    """
    if function is None and not re.search(r"^class Solution\b", code, re.MULTILINE):
        return code
    try:
        program = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    missing = sorted(_unbound_names(program) & _STATEMENTS.keys())
    futures = [node.end_lineno or 0 for node in program.body if _is_future(node)]
    lines = code.split("\n")
    at = max(futures, default=0)
    return "\n".join([*lines[:at], *(_STATEMENTS[name] for name in missing), *lines[at:]])


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _unbound_names(program: ast.Module) -> set[str]:
    """Return the names that a program uses and binds nowhere, in any of its scopes."""
    used: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(program):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add("*" if node.name == "*" else node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
    return used - bound
