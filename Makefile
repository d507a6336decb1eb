# make book   execute what changed, render the site
# make test   prove it
PYTHON ?= python3
SCALE ?= small
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help book test quick serve lab records lock clean venv

help:
	@echo "make book [SCALE=full]      execute the chapters that changed and render the site"
	@echo "make test                   units, parities, notebooks compared, the site in a browser"
	@echo "make quick                  the tests that take seconds"
	@echo "make serve                  read the site at http://127.0.0.1:8000"
	@echo "make lab CHAPTER=02_nice    edit a chapter in JupyterLab"
	@echo "make records                keep the records of the last full-scale run"
	@echo "make lock                   resolve requirements.lock anew"
	@echo "make clean                  remove what was made"

# Installed once, and again when the lock file or the package's description changes.
venv: $(VENV)/.installed
$(VENV)/.installed: requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

book: venv
	@$(BIN)/snakemake --config scale=$(SCALE)
	@echo "The book: $(if $(filter small,$(SCALE)),_build/html/index.html,_build/$(SCALE)/_build/html/index.html)  (make serve to read it in a browser)"

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(BIN)/snakemake --config scale=small
	$(BIN)/pytest
	$(BIN)/pytest --nbval book/

quick: venv
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow and not browser"

serve:
	@test -f _build/html/index.html || (echo "There is no site yet: run make book" && exit 1)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

lab: venv
	@test -f "chapters/$(CHAPTER).md" || (echo "Say which: make lab CHAPTER=$$(ls chapters | head -1 | sed 's/\.md//')" && exit 1)
	@$(BIN)/python -c 'import jupyterlab' 2>/dev/null || $(BIN)/pip install --quiet jupyterlab
	$(BIN)/jupyter lab --LabApp.default_url="/lab/tree/chapters/$(CHAPTER).md?factory=Jupytext%20Notebook"

records:
	@test -d _build/full/records || (echo "No full-scale run has left records: make book SCALE=full on a GPU machine" && exit 1)
	cp _build/full/records/*.json src/noise2tokens/records/

lock:
	uv pip compile pyproject.toml --extra book --extra test --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --quiet --upgrade -o requirements.lock

clean:
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
