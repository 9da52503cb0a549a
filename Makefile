# Verbs of the project; each does the set-up itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed
CLUSTER := $(VENV)/.cluster-installed
PYTEST := $(BIN)/python -m pytest
# Tests and benchmarks use shared data where they are, and skip with the reason where not.
ifneq ($(wildcard ../shared/data),)
export ROTSSL_DATA ?= $(abspath ../shared/data)
endif

.PHONY: setup demo ablate-demo report-demo test test-core test-system test-fast test-files test-cluster test-hosts test-servers test-all chaos fuzz audit lint format docs bench screenshots clean

setup: $(STAMP)

# uv installs the same packages as pip, from the same index, many times faster.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python jobs/demo.py

ablate-demo: $(STAMP)
	$(BIN)/python jobs/ablate.py --config jobs/sweeps/weight_budget_demo.yaml

# One small run from its training to its page, in minutes on two cores.
REPORT_RUN := results/report_demo/report-demo
report-demo: $(STAMP)
	$(BIN)/python jobs/pretrain.py --tracking.experiment report_demo --tracking.run_name report-demo --train.epochs 6
	$(BIN)/python jobs/evaluate.py --checkpoint $(REPORT_RUN)
	$(BIN)/python jobs/report.py --checkpoint $(REPORT_RUN)
	$(BIN)/python jobs/export.py --checkpoint $(REPORT_RUN) --format all

test-fast: $(STAMP)
	$(PYTEST) -m "not contract and not system and not exhaustive and not gpu and not cluster"

# Two halves at once: most tests compute on one core, and those of programs and clusters mostly wait for them. Each half prints
# when it has ended.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-core test-system

test-core: $(STAMP)
	$(PYTEST) -m "not system and not exhaustive and not cluster"

test-system: $(STAMP)
	$(PYTEST) -m "system and not exhaustive and not cluster"

# What the programs that read them say of the files in cluster/: no server is started, nothing else has to be installed.
test-files: $(CLUSTER)
	$(PYTEST) -m "cluster and not system and not slurm and not exhaustive" tests/cluster

# Each test says which program or folder it lacks. Two halves again: the tests on hosts mostly wait, for cuts and for Slurm.
ON_HOSTS := $(addprefix tests/cluster/test_,hosts.py rays.py slurm.py slurm_nodes.py)
test-cluster: $(CLUSTER)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-hosts test-servers

test-hosts: $(CLUSTER)
	$(PYTEST) -m "cluster and not exhaustive" $(ON_HOSTS)

test-servers: $(CLUSTER)
	$(PYTEST) -m "cluster and not exhaustive" tests/cluster $(addprefix --ignore=,$(ON_HOSTS))

$(CLUSTER): $(STAMP) pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev,cluster,server]"
	touch $@

test-all: $(STAMP)
	$(PYTEST)

# Up to a quarter of an hour: FAULTS faults at moments that follow from SEED, in a real run.
FAULTS ?= 20
SEED ?= 0
chaos: $(STAMP)
	$(BIN)/python scripts/chaos.py --faults $(FAULTS) --seed $(SEED)

# A quarter of an hour: made-up configurations, image folders and damaged runs, by the thousand.
fuzz: $(STAMP)
	$(BIN)/python scripts/fuzz.py --seed $(SEED)

# Known vulnerabilities of the installed packages; needs the network.
audit: $(STAMP)
	$(BIN)/python scripts/audit.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/index.html. Reference and picture are made from the code first. Not --quiet, which keeps MkDocs from counting
# warnings, and so from being strict.
docs: $(DOCS)
	$(BIN)/python scripts/docs_reference.py
	$(BIN)/python scripts/docs_picture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(DOCS): $(STAMP) pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev,docs]"
	touch $@

# Hours. Some need CIFAR-10 below ROTSSL_DATA. benchmarks/gain.py, which has stages, is started by hand.
bench: $(STAMP)
	$(BIN)/python benchmarks/augmentation.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/equal_minutes.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/convergence_sample.py
	$(BIN)/python benchmarks/methods_sample.py
	$(BIN)/python benchmarks/asha_sample.py
	$(BIN)/python benchmarks/sweep_overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/data_size.py
	$(BIN)/python benchmarks/input_wait.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/cost_model.py

# Needs a Chromium; without one it says so and leaves the picture as it is.
screenshots: $(STAMP)
	ROTSSL_SCREENSHOT=docs/mlflow_compare.png $(BIN)/python -m pytest tests/commands/test_browser.py

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
