# make book   execute what changed, render the site
# make test   prove it
PYTHON ?= python3
SCALE ?= small
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help book test quick serve lab records lock clean venv

help:
	@echo "make book [SCALE=full]      execute the chapters that changed and render the site"
	@echo "make test                   units, parities, notebooks compared, the site in a browser"
	@echo "make quick                  the tests that build and execute nothing"
	@echo "make serve                  read the site at http://127.0.0.1:8000"
	@echo "make lab CHAPTER=02_nice    edit a chapter in JupyterLab"
	@echo "make records                keep the records of the last full-scale run"
	@echo "make lock                   resolve requirements.lock anew"
	@echo "make clean                  remove what was made"

# Installed once, and again when the lock file changes.
venv: $(VENV)/.installed
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@echo "Installing into $(VENV), from the lock file: some minutes, once"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) --no-deps --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

book: venv
	@$(BIN)/snakemake --config scale=$(SCALE)
	@echo "The book: $(if $(filter small,$(SCALE)),_build/html/index.html,_build/$(SCALE)/_build/html/index.html)  (make serve to read it in a browser)"

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tools.site small
	OMP_NUM_THREADS=1 $(BIN)/pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbval book/

quick: venv
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not browser"

serve:
	@test -f _build/html/index.html || (echo "There is no site yet: run make book" && exit 1)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# Markdown opens as a notebook; the setting is kept here and not in your home.
lab: venv
	@test -f "chapters/$(CHAPTER).md" || (echo "Say which: make lab CHAPTER=$$(ls chapters | head -1 | sed 's/\.md//')" && exit 1)
	@JUPYTER_CONFIG_DIR=$(CURDIR)/_build/lab $(BIN)/jupytext-config set-default-viewer markdown
	JUPYTER_CONFIG_DIR=$(CURDIR)/_build/lab $(BIN)/jupyter lab chapters/$(CHAPTER).md

records:
	@test -d _build/full/records || (echo "No full-scale run has left records: make book SCALE=full on a GPU machine" && exit 1)
	cp _build/full/records/*.json src/noise2tokens/records/

lock:
	uv pip compile pyproject.toml --extra book --extra test --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --quiet --upgrade -o requirements.lock

clean:
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
