# make train          the quick start; CONFIG=other.toml and ARGS="--run.steps 5" as you like
# make test           checks, unit and distributed tests, and one run from end to end; WORKERS=4 for more processes,
#                     PYTEST_OPTIONS="--durations 20" for pytest
# make test-system    the other tests: vLLM, whole programs, Slurm, the sandbox under attack, a browser
# make test-all       both
# make check-te       models of Transformer Engine's modules and their checkpoints, where it can be imported: in .venv-gpu, or
#                     with TE_PYTHON=PROGRAM and TE_SITE=FOLDER, as tools/gpu_unpack.py leaves one
# make study          what is missing of the comparison of methods (hours); ARGS="--level b --workers 1"
# make study-table    its results
# make bench          the cheap benchmarks, compared with benchmarks/results (minutes); ARGS="--only push"
# make docs           the documentation's site, in build/docs
# make env | model    only the environment | only the embedded model
# make env-gpu        .venv-gpu, the environment for NVIDIA GPUs, beside .venv, with Transformer Engine, which is compiled;
#                     TE=no to go without, TE_WHEEL=PATH for a wheel of transformer-engine-torch that you have
# make train-gpu      the quick start on one GPU; CONFIG and ARGS as above
# make lock           resolve the requirements again
# make clean          everything made here, except runs/
CONFIG ?= examples/quickstart/config.toml
ARGS ?=
WORKERS ?= 2
TE := yes
TE_WHEEL :=
TE_PYTHON := .venv-gpu/bin/python
TE_SITE :=
MODEL := .cache/models/smollm2-135m-instruct
PYTHON := .venv/bin/python

.PHONY: train test test-system test-all check-te bench study study-table docs env model env-gpu gpu-is-here train-gpu lock clean

train: model
	$(PYTHON) -m megatron_mcpo train $(CONFIG) $(ARGS)

# The GPU is looked for first, because the environment takes minutes and 10 GB. TE=no of `make env-gpu` is remembered.
WITHOUT_TE := .venv-gpu/.without-te
train-gpu: CONFIG := examples/quickstart/gpu.toml
train-gpu: gpu-is-here
	@$(MAKE) --no-print-directory env-gpu $(if $(wildcard $(WITHOUT_TE)),TE=no)
	@.venv-gpu/bin/python tools/embedded_model.py $(MODEL)
	.venv-gpu/bin/python -m megatron_mcpo train $(CONFIG) $(ARGS)

# One thread: tests start several ranks, and OpenMP's spinning threads would fight over the cores.
# Offline: after `make model` nothing may be fetched.
test test-system: export OMP_NUM_THREADS := 1
test test-system: export HF_HUB_OFFLINE := 1
PYTEST := $(PYTHON) -m pytest --numprocesses $(WORKERS) $(PYTEST_OPTIONS)
ONE_RUN := tests/system/test_end_to_end.py::test_it_learns_and_leaves_what_it_promises
TESTS := tests/unit tests/distributed tests/gpu $(ONE_RUN)

test: model
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTEST) --dist worksteal $(TESTS)

# Files in the order of their names: by the number of their tests, the slowest would begin last and end alone.
test-system: model
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests/system --deselect $(ONE_RUN)

test-all: test test-system

# The first line is the condition under which the tests are not skipped.
check-te: export PYTHONPATH := $(if $(TE_SITE),$(TE_SITE):)$(CURDIR)
check-te: export OMP_NUM_THREADS := 1
check-te: export HF_HUB_OFFLINE := 1
check-te:
	@$(TE_PYTHON) -c "import torch, transformer_engine.pytorch" || { echo "check-te: $(TE_PYTHON) must be able to import \
	Transformer Engine. Make such an environment: make env-gpu" >&2; exit 2; }
	$(TE_PYTHON) -m pytest $(PYTEST_OPTIONS) tests/distributed/test_te_contract.py

study: model
	$(PYTHON) -m benchmarks.study.pretrain
	$(PYTHON) -m benchmarks.study.run $(ARGS)

study-table: env
	$(PYTHON) -m benchmarks.study.table $(ARGS)

bench: env
	$(PYTHON) -m benchmarks.guard $(ARGS)

# Generated pages are written again first: a test holds the committed ones against them.
docs: env
	$(PYTHON) -m docs.generator
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

env:
	@tools/make_env.sh

# Exit code 3: it can't be compiled here. That was said, and the program runs without it.
env-gpu:
	@tools/make_env.sh gpu
ifeq ($(TE),no)
	@touch $(WITHOUT_TE)
else
	@rm -f $(WITHOUT_TE)
	@tools/build_te.sh $(TE_WHEEL) || [ $$? -eq 3 ]
endif

gpu-is-here:
	@ls -d /dev/nvidia[0-9]* /usr/lib/wsl/lib/libcuda.so* 2>/dev/null | grep -q . || { echo "train-gpu: this machine \
	has no NVIDIA GPU (/dev/nvidia0). Use one that has, or train on the CPU: make train. Only the environment: make env-gpu" \
	>&2; exit 2; }

model: env
	@$(PYTHON) tools/embedded_model.py $(MODEL)

UV_COMPILE := .venv/bin/uv pip compile --quiet --generate-hashes --python-version 3.12 \
	--python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock"

lock: env
	$(UV_COMPILE) requirements/bootstrap.in -o requirements/bootstrap.txt
	$(UV_COMPILE) requirements/cpu.in --override requirements/overrides.txt -o requirements/cpu.lock
	$(UV_COMPILE) requirements/gpu.in --override requirements/overrides.txt -o requirements/gpu.lock
	$(UV_COMPILE) requirements/te.in --no-deps --constraint requirements/gpu.lock -o requirements/te.lock
	$(UV_COMPILE) requirements/vllm_0_26.in --no-deps -o requirements/vllm_0_26.lock

clean:
	@tools/make_env.sh --remove
	rm -rf .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
