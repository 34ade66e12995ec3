# Everything a fresh machine needs is made by the first target that needs it.

VENV ?= .venv
# The first of these that starts: a shim may exist for a version that does not.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help env system demo test test-slow lint types docs bench soak site constraints clean
help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## the Python environment (7 GB)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "RobustBoard is pinned for Python 3.11 and 3.12: make PYTHON=/path/to/one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	# The released auto_LiRPA pins a torch of 2022, so it is installed without its pins; see docs/bounds.md.
	$(BIN)/pip install --quiet --no-deps auto_LiRPA==0.3
	touch $@

system:  ## what the tests need from Debian: a browser, Fashion-MNIST and PostgreSQL
	@sh tests/install-debian-packages.sh chromium dataset-fashion-mnist postgresql

demo: env  ## train and score every defense on the embedded digits, and build site/
	$(BIN)/robustboard demo --out site

test: env system  ## the fast tests, doctests included
	# One thread for each of the processes: threads that wait for each other's cores spin.
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: env system  ## minutes to hours: floors on MNIST, third-party networks in full
	$(BIN)/pytest -m slow --timeout 3600

lint: env  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env  ## mypy, on a real install: it cannot follow an editable one
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --package robustboard

docs: env  ## the commands and links of README and docs/
	$(BIN)/pytest tests/project

bench: env  ## speed, as ratios measured in one run
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only -p no:cacheprovider --page docs/performance.md

soak: env  ## kill an evaluation at random moments for five minutes, and compare what comes out
	$(BIN)/python benchmarks/soak.py --minutes 5

site: env  ## the board from runs/
	$(BIN)/robustboard leaderboard --out site

constraints: env  ## pin what is installed now
	{ head -n 1 constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -viE '^auto.lirpa'; } > constraints.new
	mv constraints.new constraints.txt
	touch $(STAMP)

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) .tox build dist site *.egg-info
