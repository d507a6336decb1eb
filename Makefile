# make book   execute what changed, render the site
# make test   prove it
PYTHON ?= python3
SCALE ?= small
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/pip install -qq --disable-pip-version-check
# Test files, and notebooks, side by side: as many as there are cores, one thread each. A file's tests stay together.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help book test quick serve lab records lock clean venv record

help:
	@echo "make book [SCALE=long|full] execute the chapters that changed and render the site"
	@echo "make test                   units, parities, notebooks compared, the site in a browser"
	@echo "                            (make test JOBS=4: so many side by side; one for each core where left out)"
	@echo "make quick                  the tests that build and execute nothing"
	@echo "make serve                  read the site at http://127.0.0.1:8000"
	@echo "make lab CHAPTER=02_nice    edit a chapter in JupyterLab"
	@echo "make new CHAPTER=07_vq_vae  lay out a chapter; make chapter CHAPTER=... executes and renders one"
	@echo "make record CHAPTER=02_nice SCALE=long    one chapter's long or full run, without its notebook"
	@echo "make speed                  time the code beside other libraries, for the page that says how it compares"
	@echo "make records SCALE=full     keep the records of the last run of the whole book at a scale"
	@echo "make lock [UPGRADE=1]       resolve the lock files; with UPGRADE all versions anew"
	@echo "make clean                  remove what was made"

# Installed once, and again when a lock file changes.
venv: $(VENV)/.installed
$(VENV)/.installed: requirements.lock requirements-test.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@echo "Installing into $(VENV), from the lock files: some minutes, once"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) --no-deps --require-hashes -r requirements.lock
	@$(PIP) --no-deps --require-hashes -r requirements-test.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

book: venv
	@$(BIN)/snakemake --config scale=$(SCALE)
	@echo "The book: $(if $(filter small,$(SCALE)),_build/html/index.html,_build/$(SCALE)/_build/html/index.html)  (make serve to read it in a browser)"

# What is cheap and fails comes first. Each notebook is executed once, in the last line, by the kernel of an environment
# that holds only the built wheel and what it depends on; the plugin tools/compare.py compares it with what is stored.
test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tools.site small
	$(PYTEST)
	$(BIN)/python -m tools.wheel
	JUPYTER_PATH=$(CURDIR)/_build/wheel $(PYTEST) --no-loadscope-reorder --nbval --nbval-kernel-name wheel book/

quick: venv
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not browser"

serve:
	@test -f _build/html/index.html || (echo "There is no site yet: run make book" && exit 1)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# Markdown opens as a notebook; the setting is kept here and not in your home.
lab: venv
	@test -f "chapters/$(CHAPTER).md" || (echo "Say which: make lab CHAPTER=$$(ls chapters | head -1 | sed 's/\.md//')" && exit 1)
	@JUPYTER_CONFIG_DIR=$(CURDIR)/_build/lab $(BIN)/jupytext-config set-default-viewer markdown
	JUPYTER_CONFIG_DIR=$(CURDIR)/_build/lab $(BIN)/jupyter lab chapters/$(CHAPTER).md

# Text, module and tests of a new chapter, listed where chapters are listed; then one chapter's page, without the others.
.PHONY: new chapter record
new: venv
	@$(BIN)/python -m tools.new "$(CHAPTER)" "$(TITLE)"

chapter: venv
	@test -f "chapters/$(CHAPTER).md" || (echo "Say which: make chapter CHAPTER=$$(ls chapters | head -1 | sed 's/\.md//')" && exit 1)
	@$(BIN)/snakemake --quiet all -- book/$(CHAPTER).ipynb
	@$(BIN)/python -m tools.chapter $(CHAPTER)

record: venv
	$(BIN)/python -m tools.records run $(CHAPTER) $(SCALE)

# Ours beside the libraries that the tests hold it against; a page of the book shows the record.
.PHONY: speed
speed: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/speed.py

records: venv
	@$(BIN)/python -m tools.records keep $(SCALE)

# The first holds what executes and renders, and a notebook's digest holds it; the second adds what proves it, so that a
# peer can be added without executing the book again. It repeats what the first holds on some platforms only.
COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--quiet $(if $(UPGRADE),--upgrade)
lock:
	$(COMPILE) --extra book -o requirements.lock
	$(COMPILE) --extra book --extra test -c requirements.lock -o requirements-test.lock \
		$$(sed -n '/^[^ ]*==[^;]*$$/s/^\([^ ]*\)==.*/--no-emit-package \1/p' requirements.lock)

clean:
	rm -rf _build .snakemake .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
