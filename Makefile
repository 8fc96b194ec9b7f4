# make demo      draws four pictures, with diffusers' own attention and with this library, and compares them
# make demo-cp   draws two pictures on two processes and on one, and compares them: each process has half of the
#                tokens, or with guidance one of the two branches
# make demo-train  trains a LoRA on one photograph, and draws its caption before and after
#
# Everything lives in .venv and outputs/, and `make clean` takes both away. Variables, with examples:
#   PYTHON=python3.12                  the Python that .venv is made with (3.11 or newer)
#   PIP_ARGS="--index-url https://…"   more arguments for pip; for instance, on Linux without an NVIDIA GPU,
#                                      "--extra-index-url https://download.pytorch.org/whl/cpu" saves gigabytes
#   ARGS="--provider auto --steps 30"  arguments for the demo, or for pytest
#   DIFFUSERS_TESTS=FOLDER             a copy of `tests` of diffusers' repository, for test-peers
#   KEEP=torch                         packages that test-oldest and test-newest use in the tested version

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
KEEP ?=
DIFFUSERS_TESTS ?=
# Threads that wait should sleep: if they spin, a machine that is busy with other work runs this ten times as slowly.
export OMP_WAIT_POLICY ?= passive

# A worker of pytest for each core, up to eight. Files stay whole, since their tests share what they set up.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

# A stamp is worth nothing without a Python that starts (an interrupted clean, a system Python that was upgraded).
$(shell $(RUN) -c "" 2>/dev/null || rm -f $(VENV)/.demo $(VENV)/.train $(VENV)/.docs $(VENV)/.dev)

.DEFAULT_GOAL := help
.PHONY: help demo demo-cp demo-train test test-all test-thorough coverage lint docs docs-check docs-site constraints test-oldest test-newest test-peers audit clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' Makefile | expand -t 12

demo: $(VENV)/.demo  ## install what is needed into .venv, then run examples/quickstart.py
	@$(RUN) examples/quickstart.py $(ARGS)

demo-cp: $(VENV)/.demo  ## the demo's model on two processes (on the CPU) and on one
	@OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 examples/inference_cp.py \
	  --device cpu --compare --steps 12 --output outputs/demo_cp.png $(ARGS)
	@OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 examples/inference_cp.py \
	  --device cpu --compare --steps 12 --negative_prompt "a dog" --set true_cfg_scale=1.5 --times \
	  --output outputs/demo_guidance.png

demo-train: $(VENV)/.train  ## train a LoRA on one photograph, and draw its caption before and after
	@$(RUN) examples/demo_train.py $(ARGS)

test: $(VENV)/.dev  ## the tests that take no more than seconds each, on the CPU
	@$(RUN) -m pytest -q $(WORKERS) $(ARGS)

# What test-all runs. Coverage makes tests several times slower, those that compile even more, so it measures only the
# tests of attention calls that take seconds: they cover enough of that code.
MOST := not gpu and not multi_gpu and not thorough
CORE := diffusers_attn/dispatch.py,diffusers_attn/masks.py,diffusers_attn/context_parallel/sequences/*,diffusers_attn/context_parallel/attention/*
CORE_TESTS := $(addprefix tests/,test_dispatch.py test_masks.py test_tensor_kinds.py test_recompute.py test_scope.py \
  test_repeated_calls.py cp_plans $(addprefix context_parallel/,attention comm hooks sequences test_mesh.py))
CORE_REPORT := $(RUN) -m coverage report --include='$(CORE)' --fail-under=95

ifeq ($(strip $(ARGS)),)
test-all: $(VENV)/.dev  ## all tests on the CPU but those of test-thorough; fails where they leave out 5 % of attention calls
	@$(RUN) -m coverage erase && $(RUN) -m coverage run -m pytest -q $(WORKERS) -m '$(MOST) and not slow' $(CORE_TESTS); \
	  core=$$?; TESTS_WITH_COVERAGE='$(CORE_TESTS)' $(RUN) -m pytest -q $(WORKERS) -m '$(MOST)'; rest=$$?; \
	  $(RUN) -m coverage combine --quiet && $(CORE_REPORT) && exit $$((core | rest))
else
test-all: $(VENV)/.dev
	@$(RUN) -m pytest -q $(WORKERS) -m '$(MOST)' $(ARGS)
endif

test-thorough: $(VENV)/.dev  ## tests of test-all again, on all models, families and meshes
	@$(RUN) -m pytest -q $(WORKERS) -m 'thorough and not gpu and not multi_gpu' $(ARGS)

test-oldest: .venv-oldest/.dev  ## tests of `make test` with the oldest versions that pyproject.toml accepts
test-newest: .venv-newest/.dev  ## tests of `make test` with the newest versions
test-oldest test-newest: test-%:
	@.venv-$*/bin/python -m pytest -q $(WORKERS) $(ARGS)

# The repository's folder of tests, which the sdist does not have; DIFFUSERS_TESTS=FOLDER takes one that is there.
test-peers: $(VENV)/.dev  ## tests of diffusers and PyTorch, with and without this library under them
	@$(PIP) --quiet expecttest
	@tests="$(DIFFUSERS_TESTS)"; if [ -z "$$tests" ]; then \
	  version=$$($(RUN) -c 'import importlib.metadata as m; print(m.version("diffusers"))') && \
	  folder=outputs/diffusers-$$version && tests=$$folder/tests && { [ -d $$tests ] || \
	  git clone --quiet --depth 1 --branch v$$version https://github.com/huggingface/diffusers $$folder; } || exit 1; \
	fi; $(RUN) -m tests.peers "$$tests" --hub $(ARGS)

# Advisories about functions that nothing here calls: the second table of SECURITY.md.
NOT_OURS := CVE-2025-3000 CVE-2026-4538 CVE-2026-69112 CVE-2026-136426 CVE-2026-136427
AUDIT := $(RUN) -m pip_audit --strict --no-deps --disable-pip $(addprefix --ignore-vuln ,$(NOT_OURS))

audit: $(VENV)/.dev  ## known vulnerabilities of the tested versions and of the oldest that pyproject.toml accepts
	@$(PIP) --quiet pip-audit
	@mkdir -p outputs && $(RUN) $(COMPILE) --resolution lowest-direct --output-file outputs/oldest.txt
	@for versions in constraints.txt outputs/oldest.txt; do \
	  echo "$$versions" && $(AUDIT) --requirement $$versions $(ARGS) || exit 1; done

coverage: $(VENV)/.dev  ## all tests with their branch coverage, also of the processes that they start
	@$(RUN) -m coverage erase && $(RUN) -m coverage run -m pytest -q $(WORKERS) -m 'not gpu and not multi_gpu' $(ARGS); \
	  status=$$?; $(RUN) -m coverage combine --quiet && $(RUN) -m coverage report && $(CORE_REPORT) && exit $$status

lint: $(VENV)/.dev  ## formatting, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy diffusers_attn benchmarks docs tests
	$(RUN) -m mypy examples integrations

docs: $(VENV)/.dev  ## write the generated tables and pictures of docs/
	@$(RUN) docs/generate.py

docs-check: $(VENV)/.dev  ## fail where such a table or picture is stale
	@$(RUN) docs/generate.py --check

docs-site: $(VENV)/.docs  ## build the pages as a site in outputs/site; fail where a link leads nowhere
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet && echo "open outputs/site/index.html"

# Keeps the versions that constraints.txt has, where they still fit; ARGS=--upgrade takes the newest of all, and
# ARGS="--upgrade-package peft" the newest of one.
COMPILE = -m uv pip compile pyproject.toml --extra demo-train --extra all --extra docs --no-emit-index-url --annotation-style line --quiet
HEADER := make constraints  (the versions that are tested; pyproject.toml has the accepted ranges)

constraints: $(VENV)/.dev  ## write constraints.txt anew, from pyproject.toml
	@$(RUN) $(COMPILE) --extra dev --universal --python-version 3.11 --custom-compile-command "$(HEADER)" \
	  --output-file constraints.txt $(ARGS)
	@mkdir -p outputs && { grep '^#' constraints.txt; \
	  printf '\n# Named in pyproject.toml\n'; grep '^[^#]*#.*(pyproject.toml)' constraints.txt; \
	  printf '\n# What these need\n'; grep '^[^#]' constraints.txt | grep -v '(pyproject.toml)'; } > outputs/constraints.txt
	@mv outputs/constraints.txt constraints.txt

clean:  ## remove .venv, outputs and caches
	rm -rf $(VENV) .venv-oldest .venv-newest outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes away before anything is changed and comes back when all went well. So a stale stamp means a sound .venv
# that wants an update, and no stamp means one to be made from nothing.
$(VENV)/.demo: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.version_info >= (3, 11) or sys.exit(f"constraints.txt needs Python 3.11 or newer; $(PYTHON) is {v}: make PYTHON=python3.12 ...")'
	@if [ -e $@ ]; then rm $@; else echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "installing the tested versions of constraints.txt (the first time, torch is a large download)"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.train: $(VENV)/.demo
	@rm -f $@
	@$(PIP) --editable '.[demo-train]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	@rm -f $@
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@rm -f $@
	@$(PIP) --editable '.[dev]'
	@touch $@

# Environments of their own with the ends of pyproject.toml's ranges: the oldest or the newest version of what it names,
# and the newest of what these need. Tools and packages in KEEP have the tested version.
.venv-oldest/.dev .venv-newest/.dev: .venv-%/.dev: constraints.txt pyproject.toml
	@echo "making .venv-$*"
	@$(PYTHON) -m venv --clear .venv-$*
	@for name in ruff mypy uv pytest pytest-xdist coverage hypothesis $(KEEP); do \
	  grep "^$$name==" constraints.txt || exit 1; done > .venv-$*/kept.txt
	@.venv-$*/bin/python -m pip install --disable-pip-version-check --quiet --constraint .venv-$*/kept.txt $(PIP_ARGS) uv
	@.venv-$*/bin/python -m uv pip compile pyproject.toml --extra dev --constraints .venv-$*/kept.txt --quiet \
	  --no-emit-index-url --resolution $(if $(filter oldest,$*),lowest-direct,highest) --output-file .venv-$*/constraints.txt
	@.venv-$*/bin/python -m pip install --disable-pip-version-check --constraint .venv-$*/constraints.txt $(PIP_ARGS) \
	  --editable '.[dev]'
	@touch $@
