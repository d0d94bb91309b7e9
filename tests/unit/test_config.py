"""Reading, overriding, refusing and writing configurations.

Not covered: what needs the model or the number of ranks beyond `Config.layout`, and which generators are allowed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mcpo.config.config import Config, ConfigError, dump, load
from megatron_mcpo.config.summary import empty_terms
from megatron_mcpo.config.toml_io import to_toml
from tests.support.paths import ROOT

QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"

SMALL = {
    "run": 'name = "r"\nsteps = 3',
    "model": 'path = "m"',
    "batch": "prompts = 4\nsamples = 2",
    "optimizer": "lr = 0.1",
}
DOMAINS = '[[domain]]\nname = "{}"\n[[domain.sources]]\ngenerator = "g"\n'


def write(tmp_path: Path, *, domains: tuple[str, ...] = ("a", "b"), **sections: str) -> Path:
    tables = "".join(f"[{name}]\n{keys}\n" for name, keys in (SMALL | sections).items())
    path = tmp_path / "config.toml"
    path.write_text(tables + "".join(DOMAINS.format(name) for name in domains), encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems


def reload(config: Config, tmp_path: Path) -> Config:
    path = tmp_path / "dumped.toml"
    path.write_text(dump(config), encoding="utf-8")
    return load(path)


def test_quickstart_is_valid_and_names_five_domains():
    config = load(QUICKSTART)
    assert config.domain_names == ["arithmetic", "algorithmic", "algebra", "cognition", "ordering"]
    assert config.batch.samples == 8


def test_quickstart_generators_accept_their_options():
    import reasoning_gym

    for domain in load(QUICKSTART).domain:
        for source in domain.sources:
            dataset = reasoning_gym.create_dataset(source.generator, size=2, seed=0, **source.options)
            assert dataset.score_answer(dataset[0]["answer"], dataset[0]) == 1.0, source


def test_round_trip_of_every_optional_value(tmp_path):
    path = write(tmp_path, parallel="data = 3", contrastive="dim = 7", run='steps = 1\ntrackers = ["wandb"]')
    config = load(path)
    assert config.contrastive.dim == 7
    assert config.parallel.data == 3
    assert load(write(tmp_path)).contrastive.dim is None
    assert reload(config, tmp_path) == config
    assert reload(load(QUICKSTART), tmp_path) == load(QUICKSTART)


plain = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8)
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@settings(deadline=None)  # other ranks may share the cores
@given(
    options=st.dictionaries(st.text(max_size=6), nested, max_size=4), instruction=st.text(), lr=st.floats(1e-30, 1e30)
)
def test_round_trip_of_any_text_and_number(tmp_path_factory, options, instruction, lr):
    folder = tmp_path_factory.mktemp("round_trip")
    values = load(write(folder)).model_dump()
    values["optimizer"]["lr"] = lr
    values["domain"][0]["instruction"] = instruction
    values["domain"][0]["sources"][0]["options"] = options
    config = Config.model_validate(values)
    assert reload(config, folder) == config


flags = st.sampled_from(
    ["--run.name", "--optimizer.lr=", "--parallel.data", "--domain.0", "--batch", "--rewards.x=", "--."]
)


@settings(deadline=None)
@given(st.lists(flags | st.text(max_size=12), max_size=6))
def test_any_command_line_is_applied_or_refused(tmp_path_factory, arguments):
    path = write(tmp_path_factory.mktemp("overrides"))
    try:
        load(path, arguments)
    except ConfigError as error:
        assert error.problems


def test_overrides_in_both_spellings(tmp_path):
    overrides = ["--optimizer.lr", "1", "--batch.prompts=16", "--parallel.sequence", "false"]
    config = load(write(tmp_path), [*overrides, "--algorithm.importance", "off"])
    assert (config.optimizer.lr, config.batch.prompts, config.parallel.sequence) == (1.0, 16, False)
    assert config.algorithm.importance == "off"


@pytest.mark.parametrize("text", ["20261123", "true", "1.5", "2026-11-23"])
def test_a_text_may_look_like_another_toml_value(tmp_path, text):
    assert load(write(tmp_path), ["--run.name", text]).run.name == text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run.steps", "3"], "run.steps: not an override"),
        (["--steps", "3"], "--steps: not an override. Write --section.key VALUE. Did you mean --run.steps?"),
        (["--run.steps"], "--run.steps: has no value"),
        (["--run.name", "--run.steps", "5"], "--run.name: has no value"),
        (["--domain.name", "x"], "overrides reach only the keys of single tables. Edit 'domain' in the file."),
        (["--run.a.b", "x"], "overrides reach only the keys of single tables. Edit 'run' in the file."),
        (["--run.stepz", "3"], "run.stepz: unknown key. Did you mean 'steps'?"),
        (["--runs.steps", "3"], "runs: unknown key. Did you mean 'run'?"),
        (["--run.steps", "many"], "run.steps = 'many': must be an integer"),
        (["--run.steps", "2\n[other]"], "run.steps = '2\\n[other]'"),
    ],
)
def test_bad_overrides(tmp_path, overrides, expected):
    (problem,) = problems_of(write(tmp_path), *overrides)
    assert expected in problem


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("run", "steps = 0", "run.steps = 0: must be greater than 0. Raise it. Meaning: number of training steps"),
        ("run", "steps = 2.0", "run.steps = 2.0: must be an integer"),
        ("run", "steps = true", "run.steps = true: must be an integer"),
        ("run", 'steps = 1\nname = ".."', "run.name = '..': must match ^"),
        ("run", 'steps = 1\nname = "a/b"', "run.name = 'a/b': must match ^"),
        (
            "run",
            'steps = 1\nname = "latest"',
            "run.name = 'latest': must be another name (this is the link to the newest run). Rename it.",
        ),
        ("run", 'name = "x"', "run.steps: missing. Add it. Meaning: number of training steps"),
        ("model", 'path = ""', "model.path = ''"),
        ("model", 'path = "m"\ndtype = "fp16"', "model.dtype = 'fp16': must be 'bf16' or 'fp32'"),
        ("batch", "prompts = 4\nsamples = 1", "batch.samples = 1: must be greater than 1"),
        (
            "batch",
            "prompts = 4\nsamples = 2\nminibatches = 5",
            "batch.minibatches = 5: must be at most batch.prompts = 4 (",
        ),
        (
            "batch",
            "prompts = 4\nsamples = 2\nminibatches = 3",
            "batch.minibatches = 3: must be at most half of batch.prompts = 4 (",
        ),
        (
            "batch",
            "prompts = 4\nsamples = 2\nmicro_batch_tokens = 9",
            "batch.micro_batch_tokens = 9: must be at least 528 (the longest rollout must fit",
        ),
        ("optimizer", "lr = nan", "optimizer.lr = nan: must be"),
        ("optimizer", "lr = inf", "optimizer.lr = inf: must be"),
        ("optimizer", "lr = 0.1\nbeta1 = 1.0", "optimizer.beta1 = 1.0: must be less than 1"),
        (
            "optimizer",
            "lr = 0.1\nmin_lr = 0.2",
            "optimizer.min_lr = 0.2: must be at most optimizer.lr = 0.1. Lower it.",
        ),
        (
            "algorithm",
            "importance_cap = -1.0",
            "must be greater than 0. Raise it. Meaning: largest importance weight. Default: 2.0.",
        ),
        ("algorithm", 'clip = "trpo"', "algorithm.clip = 'trpo': must be 'ppo', 'gspo' or 'cispo'"),
        ("algorithm", 'kl_estimator = "k4"', "algorithm.kl_estimator = 'k4': must be 'k2' or 'k3'"),
        ("algorithm", "clip_low = 1.5", "algorithm.clip_low = 1.5: must be at most 1"),
        (
            "contrastive",
            "temperature = 0.0",
            "contrastive.temperature = 0.0: must be greater than 0. Raise it. Meaning: temperature tau",
        ),
        (
            "contrastive",
            "temperature = -0.1",
            "contrastive.temperature = -0.1: must be greater than 0. Raise it. Meaning: temperature tau",
        ),
        ("contrastive", "top_k = 0", "contrastive.top_k = 0: must be greater than 0"),
        ("contrastive", "threshold = 1.5", "contrastive.threshold = 1.5: must be at most 1"),
        ("contrastive", 'transfer = "nearest"', "must be 'top_k', 'threshold' or 'all'"),
        ("contrastive", "cross_domain_weight = -0.1", "must be at least 0. Raise it. Meaning: weight lambda"),
        ("parallel", "virtual_pipeline = 2", "parallel.virtual_pipeline = 2: requires parallel.pipeline >= 2 ("),
        ("run", "steps = 5\nkeep_every = 7", "run.keep_every = 7: must be a multiple of run.checkpoint_every = 5"),
        ("rollout", "temperature = 0.0", "rollout.temperature = 0.0: must be at least 0.01. Raise it"),
        ("rollout", "temperature = 2.5", "rollout.temperature = 2.5: must be at most 2. Lower it"),
        ("evaluation", "temperature = 2.5", "evaluation.temperature = 2.5: must be at most 2. Lower it"),
        ("evaluation", "temperature = 0.005", "evaluation.temperature = 0.005: must be 0 or at least 0.01 ("),
        ("evaluation", "samples = 4", "evaluation.samples = 4: must be 1 with evaluation.temperature = 0 ("),
        ("new", "x = 1", "new: unknown key. Known keys: run, model"),
    ],
)
def test_each_bad_value_is_named_with_rule_and_fix(tmp_path, section, keys, expected):
    (problem,) = problems_of(write(tmp_path, **{section: keys}))
    assert expected in problem


@pytest.mark.parametrize(
    ("domains", "expected"),
    [
        (("a", "a"), "'a': must be unique (two domains have it). Rename one."),
        (("a", "mean"), "'mean': must be another name (the metrics use this one)"),
        (("a", "worst"), "'worst': must be another name (the metrics use this one)"),
        (("a", "b/c"), "domain[1].name = 'b/c'"),
        ((), "domain: missing"),
    ],
)
def test_bad_domains(tmp_path, domains, expected):
    (problem,) = problems_of(write(tmp_path, domains=domains))
    assert expected in problem


CLIPO = ["--contrastive.mode=reward", "--contrastive.negatives=prompt", "--contrastive.cross_domain_weight=0"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [*CLIPO, "--contrastive.in_domain_weight=0"],
            "contrastive.mode = 'reward': requires a contrastive term (cross_domain_weight and in_domain_weight are 0)",
        ),
        (
            ["--algorithm.importance=mask", "--algorithm.importance_floor=2"],
            "algorithm.importance_floor = 2.0: must be below algorithm.importance_cap = 2.0 (else every ",
        ),
        (
            ["--engine.quantization=fp8_per_block", "--algorithm.importance=off"],
            "algorithm.importance = 'off': must be 'truncate', 'mask' or 'reject' (a quantized engine",
        ),
        (
            ["--engine.quantization=fp8_per_block", "--model.dtype=fp32"],
            "model.dtype = 'fp32': must be 'bf16' (vLLM computes in it with engine.quantization =",
        ),
        (
            ["--algorithm.clip=gspo", "--parallel.context=2"],
            "algorithm.clip = 'gspo': requires parallel.context = 1 (its ratio needs all tokens of a rollout on one "
            "rank; context is 2). Set that, or use another clip.",
        ),
        (
            ["--algorithm.importance=reject", "--parallel.context=2"],
            "algorithm.importance = 'reject': requires parallel.context = 1 (its ratio needs all tokens of a rollout ",
        ),
        (
            ["--engine.staleness=1"],
            "engine.staleness = 1: requires engine.servers (engines inside the trainer's ranks can't sample",
        ),
        (
            ["--engine.staleness=2", "--engine.oversample=2.5", '--engine.servers=["http://a:1"]'],
            "engine.oversample = 2.5: must be at most engine.staleness = 2 (prompts under way",
        ),
        (
            ["--model.fp8=mxfp8"],
            "model.fp8 = 'mxfp8': must be 'off', 'blockwise' or 'tensorwise' (MXFP8 needs a Blackwell GPU, compute "
            "capability 10.0, and is not supported). Set it to one of them.",
        ),
    ],
    ids=[
        *("reward", "importance", "quantized importance", "quantized dtype", "sequence ratio", "rejection"),
        *("staleness without servers", "oversample", "mxfp8"),
    ],
)
def test_methods_that_contradict_themselves(tmp_path, overrides, expected):
    (problem,) = problems_of(write(tmp_path), *overrides)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        CLIPO,
        ["--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0"],
        ["--algorithm.importance=mask"],
        ["--algorithm.importance=mask", "--engine.quantization=fp8_per_block", "--model.dtype=bf16"],
        ["--algorithm.importance_floor=9"],  # only mask has a floor
        ["--algorithm.clip=gspo", "--parallel.tensor=2"],
        ["--algorithm.clip=cispo", "--parallel.context=2"],
    ],
)
def test_methods_at_the_edge_of_these_rules_are_allowed(tmp_path, overrides):
    assert load(write(tmp_path), overrides)


def test_contrastive_terms_are_on_where_one_has_a_weight(tmp_path):
    off = ["--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0"]
    assert not load(write(tmp_path), off).contrastive.enabled
    assert load(write(tmp_path), off[:1]).contrastive.enabled and load(write(tmp_path), off[1:]).contrastive.enabled


def test_one_domain_leaves_the_sharing_term_empty_which_is_worth_a_note(tmp_path):
    alone = load(write(tmp_path, domains=("a",)))
    (note,) = empty_terms(alone)
    assert note.startswith("contrastive.cross_domain_weight = 0.1: cross-domain sharing needs at least two domains")
    assert empty_terms(load(write(tmp_path, domains=("a",)), ["--contrastive.cross_domain_weight=0"])) == []
    assert empty_terms(load(write(tmp_path))) == []


def test_single_brackets_and_plain_values_where_tables_belong(tmp_path):
    path = write(tmp_path, domains=(), domain='name = "a"')
    assert "must be a list of tables. Write [[domain]], in double brackets." in problems_of(path)[0]
    path.write_text("run = 3\n", encoding="utf-8")
    assert "run = 3: must be a table" in problems_of(path)[0]


def test_all_problems_at_once(tmp_path):
    path = write(tmp_path, run="steps = 0\nnmae = 1", batch="prompts = 1\nsamples = 2\nminibatches = 2")
    problems = problems_of(path, "--bad", "--optimizer.lr", "x", "--optimizer.min_lr", "5")
    text = "\n".join(problems)
    for expected in ("--bad", "run.steps", "Did you mean 'name'", "batch.minibatches", "optimizer.lr = 'x'"):
        assert expected in text
    # A rule about a section that is already broken would judge a default in place of what was meant.
    assert "must be at most optimizer.lr" not in text
    assert len(problems) == 5


def test_unreadable_files(tmp_path):
    assert "no such file" in problems_of(tmp_path / "none.toml")[0]
    assert "is a folder" in problems_of(tmp_path)[0]
    path = tmp_path / "bad.toml"
    for content in (b"[run\n", b"a = 1\na = 2\n", b"\xff\xfe", b"a = " + b"[" * 5000):
        path.write_bytes(content)
        problems = problems_of(path, "--bad")
        assert "not valid TOML" in problems[0]
        assert len(problems) == 2


def test_a_byte_order_mark_is_no_problem(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path).run.steps == 3


def test_layout_takes_the_rest_of_the_ranks_for_data(tmp_path):
    config = load(write(tmp_path), ["--parallel.tensor", "2"])
    assert config.layout(None).world_size == 2
    assert (config.layout(6).data, config.layout(6).sequence) == (3, True)


@pytest.mark.parametrize(
    ("overrides", "fewest"),
    [
        (["--parallel.pipeline=2", "--engine.tensor_parallel=4"], 4),
        (["--parallel.tensor=3", "--engine.tensor_parallel=2"], 6),
        (["--parallel.pipeline=2", "--parallel.expert=8", "--engine.tensor_parallel=4"], 16),
        (["--engine.tensor_parallel=4", '--engine.servers=["http://127.0.0.1:8000"]'], 1),
    ],
)
def test_the_fewest_ranks_are_those_that_every_size_divides(tmp_path, overrides, fewest):
    assert load(write(tmp_path), ["--batch.prompts=16", *overrides]).layout(None).world_size == fewest


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["--parallel.tensor=4"], 6, "needs a multiple of 4 ranks, there are 6"),
        (["--parallel.tensor=4"], 2, "needs a multiple of 4 ranks, there are 2"),
        (["--parallel.data=4"], 2, "needs 4 ranks, there are 2"),
        (["--engine.tensor_parallel=2"], 3, "engine.tensor_parallel = 2: must divide"),
        (["--batch.prompts=2"], 4, "batch.prompts = 2: must be at least 4 "),
    ],
)
def test_layouts_that_do_not_divide(tmp_path, overrides, world_size, expected):
    with pytest.raises(ConfigError, match=expected):
        load(write(tmp_path), overrides).layout(world_size)


def test_toml_leaves_out_what_is_not_set():
    assert to_toml({"a": {"b": None, "c": "\x7f\t\U0001f600"}}) == '[a]\nc = "\\u007f\t\U0001f600"\n'


def test_reading_a_configuration_imports_no_torch():
    code = (
        f"import sys, pathlib; from megatron_mcpo.config.config import load; load(pathlib.Path({str(QUICKSTART)!r}));"
        "assert not {'torch', 'numpy', 'transformers', 'megatron', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=400)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),
        (["--contrastive.cross_domain_weight=0"], True),
        (["--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0"], False),
        (["--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0", "--batch.minibatches=2"], True),
    ],
)
def test_only_terms_and_several_updates_need_a_scoring_pass(tmp_path, overrides, expected):
    """Whether there is a reference does not matter: it has a pass of its own."""
    assert load(write(tmp_path), overrides).scores_policy is expected
