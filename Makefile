# Nothing is needed before `make demo` or `make test`: each of them sets up what it uses.

PYTHON ?= # the interpreter that .venv is built from; empty means: the first of python3.11 and python3 that fits
JOBS   ?= 2
TESTS  ?= # what pytest shall run, such as tests/test_config.py; empty means everything, with the coverage demanded

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH  = $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' lock.txt)

# The tests stay away from the network, and two workers that each used every core would only wait for one another.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
COVERAGE := --cov=baft --cov-report=term-missing:skip-covered --cov-fail-under=95

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: check clean demo help host lock test

help:  ## Say what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: host  ## Edit the embedded model on this machine and show what came of it
	$(PY) demo/run.py

test: check host  ## Run every check, then every test, and demand the coverage
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) --dist loadscope $(if $(strip $(TESTS)),$(TESTS),$(COVERAGE))

check: $(STAMP)  ## Lint, format, types, layers, dead code, dependencies, spelling
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m vulture
	$(PY) -m deptry src
	$(PY) -m codespell_lib

lock: $(STAMP)  ## Write lock.txt anew from pyproject.toml; UPGRADE=--upgrade takes the newest releases
	$(PY) -m pip install -q uv
	$(PY) -m uv pip compile pyproject.toml --extra dev --extra general --python-version 3.11 --universal --no-annotate \
		--custom-compile-command 'make lock' $(UPGRADE) -q -o lock.txt

clean:  ## Remove everything that was built, .venv included
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

host: $(STAMP)
	$(PY) -m baft.hosts.embedded smollm2

# Written last, so that an interrupted installation is begun again from nothing; a changed list of dependencies
# is brought up to date in place. torch comes first and by itself: whatever build pip finds for this machine is
# then kept, and the lock adds no CUDA package to it.
$(STAMP): pyproject.toml lock.txt
	@set -eu; \
	if [ ! -e $(STAMP) ]; then \
		python=''; \
		for one in $(or $(strip $(PYTHON)),python3.11 python3); do \
			if "$$one" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$one"; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'baft needs Python 3.11 or newer, and none of $(or $(strip $(PYTHON)),python3.11 python3) is one.' >&2; \
			echo 'Install it, or name it: make test PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		echo "Building $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	rm -f $(STAMP); \
	echo 'Installing $(TORCH)'; \
	$(PY) -m pip install -q '$(TORCH)'; \
	echo 'Installing baft and what develops it'; \
	$(PY) -m pip install -q -e '.[dev]' -c lock.txt; \
	touch $(STAMP)
