# Everything from nothing: each target makes its own virtual environment, installs the package and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint check docs package release pocket clean

demo: $(VENV)/.demo
	$(BIN)/lcmlora demo --out demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

docs: $(VENV)/.dev  # the site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.demo: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	PYTHON=$(PYTHON) scripts/setup.sh $(VENV) dev
	touch $@

package: $(VENV)/.release  # the sdist and the wheel, each installed in an empty environment and used
	$(BIN)/python scripts/package.py

release: $(VENV)/.release  # make release VERSION=0.2.0
	$(BIN)/python scripts/release.py $(VERSION)

$(VENV)/.release: pyproject.toml constraints.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip>=25.1'
	$(BIN)/python -m pip install -q -c constraints.txt --group release
	touch $@

pocket: $(VENV)/.dev  # train the embedded model anew: hours on two cores
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train]' --group pocket
	PATH="$(abspath $(BIN)):$$PATH" examples/pocket/make.sh $(or $(WORK),pocket-work)

clean:
	rm -rf $(VENV) demo dist build .pytest_cache .mypy_cache .ruff_cache site
