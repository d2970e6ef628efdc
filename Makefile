# Two commands: `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export POLYRANK_DATA ?= $(abspath ../shared/data)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
WORKERS ?= 2

.PHONY: demo test install lint types imports axe unit faults audit clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[retrieval,dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(VENV)/bin/polyrank demo

test: install lint types imports unit

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

imports: install
	$(VENV)/bin/lint-imports

# the accessibility checker of the report pages' tests, by version and hash; skipped by name where there is no npm
axe:
	@if command -v npm > /dev/null; then \
		npm ci --prefix tests/report --ignore-scripts --no-audit --no-fund \
			|| echo "no axe-core: its tests are skipped"; \
	fi

unit: install axe
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist=worksteal

faults: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) benchmarks/faults.py --page

# known vulnerabilities of the pinned versions; asks a service on the network
audit: install
	$(PY) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install -q pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(AUDIT)

clean:
	rm -rf $(VENV) runs multirun outputs .mypy_cache .ruff_cache
