# Nothing is needed but Python 3.11 or newer and make.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# tests that together reach every line of the mathematics; to count lines costs a third of the time
MATHEMATICS := bradley_terry comparison decdpo fairness feedback figures files intervals losses mathematics methods multiobjective newcomers policy private_sums robust topology

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-offline deploy-demo test test-long test-slow mutants lint references docs release

help:
	@echo "make setup   create .venv and install fedpref with everything it needs"
	@echo "make demo    a model of each client's own, of SmolLM2-135M (93 MB are fetched once), beside one for all"
	@echo "make demo-offline   the same on the small shipped model, without a download"
	@echo "make deploy-demo   a server and three sites on this machine, over mutual TLS"
	@echo "make test    run the test suite"
	@echo "make test-long   what takes seconds each: whole runs over sites, killed and taken up again"
	@echo "make test-slow   what takes minutes: a federation with certificates, every algorithm over simulated sites"
	@echo "make mutants     how many small errors in the mathematics and the algorithms the tests notice (half an hour)"
	@echo "make references  write settings, commands and layers into the documents, from the code"
	@echo "make docs    build the documents into build/site"
	@echo "make lint    ruff and mypy --strict"
	@echo "make release URL=https://...   wheel and source distribution of the last commit, checked; URL: where its files can be read"

setup:
	@$(PYTHON) scripts/bootstrap.py $(CONSTRAINTS)

demo: setup
	@$(BIN)/fedpref demo

demo-offline: setup
	@$(BIN)/fedpref demo --offline

deploy-demo: setup
	@$(BIN)/python scripts/deploy_demo.py runs/deploy-demo-$$(date +%Y%m%d-%H%M%S)

test: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile $(foreach file,$(MATHEMATICS),--ignore tests/test_$(file).py)
	@$(BIN)/python -m pytest -n auto --dist worksteal $(foreach file,$(MATHEMATICS),tests/test_$(file).py) --cov --cov-report=term

test-long: setup
	@$(BIN)/python -m pytest -n auto --dist loadfile -m 'long and not slow'

test-slow: setup
	@$(BIN)/python -m pytest -m slow

mutants: setup
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py

references: setup
	@$(BIN)/python scripts/references.py

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "documents: build/site/index.html"

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

release: setup
	@test -n "$(URL)" || { echo "make release URL=https://HOST/PROJECT/blob/VERSION: where this version's files can be read"; exit 2; }
	@$(BIN)/python scripts/release.py --url "$(URL)"
