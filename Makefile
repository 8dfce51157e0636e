# Every command of this project. `make` alone lists them.

PYTHON ?= python3
UV_VERSION := 0.13.8
BIN := .venv/bin
STORY := fine_tuning_vlm_for_object_detection_trl
TOPICS := $(patsubst notebooks/%.py,%,$(wildcard notebooks/*.py))
PAIRED := $(STORY).py $(TOPICS:%=notebooks/%.py)
DATASET := outputs/tiny_dataset
EXECUTED := outputs/demo/$(STORY).ipynb
# nothing comes from a hub; JUPYTER_PATH comes first in Jupyter's search, so python3 is this environment's kernel
PAPERMILL := HF_HUB_OFFLINE=1 JUPYTER_PATH=$(CURDIR)/.venv/share/jupyter $(BIN)/papermill \
  --kernel python3 --language python --progress-bar

.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-runs test-helpers test-campaigns lint sync from-notebook notebook topics topic requirements

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed $(DATASET)/.drawn  ## run the whole notebook on the embedded tiny model and data, without GPU or hub
	@mkdir -p $(dir $(EXECUTED))
	@echo "The notebook: 2 minutes until the recipes, 10 for the four of them, half a minute to the end, on two cores."
	$(PAPERMILL) $(STORY).ipynb $(EXECUTED) --parameters_file helpers/tiny/demo.yaml -p AGAIN True --log-output
	$(BIN)/jupyter nbconvert --to html --CoalesceStreamsPreprocessor.enabled=True $(EXECUTED)
	@echo "Read it: $(EXECUTED:.ipynb=.html)"

# of like duration: whole runs, and all other tests
RUNS := tests/test_notebook.py tests/test_train_recipe.py tests/test_families.py tests/test_results.py

test: lint .venv/browser  ## lint, then run the tests; whole runs and the rest side by side, a thread each
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 test-runs test-helpers

test-all: test test-campaigns  ## the same, and what takes minutes: full disks, trackers, sharding, the duel, GRPO's speed, r1 compiled

test-runs:
	$(BIN)/python -m pytest -q -m "not campaign" $(RUNS)

test-helpers:
	$(BIN)/python -m pytest -q -m "not campaign" $(RUNS:%=--ignore %)

test-campaigns: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m campaign

lint: .venv/installed-dev  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

sync: .venv/installed-dev  ## print the notebooks and helper modules from the scripts
	$(BIN)/python -m helpers.export --keep notebook
	$(BIN)/ruff format --quiet $(PAIRED)
	$(BIN)/jupytext --quiet --update --to ipynb $(PAIRED)
	$(BIN)/python -m helpers.export --synced
	$(BIN)/python -m helpers.export

from-notebook: .venv/installed-dev  ## take edits made in Jupyter or Colab back into the scripts, then sync
	$(BIN)/python -m helpers.export --keep script
	$(BIN)/jupytext --quiet --to py:percent $(PAIRED:.py=.ipynb)
	$(BIN)/python -m helpers.export --synced
	$(MAKE) sync

notebook: sync  ## run the demo, then the topics, and keep their outputs in the committed notebooks
	$(MAKE) demo
	$(BIN)/python -m helpers.export $(EXECUTED)
	cp $(dir $(EXECUTED))predictions.png helpers/tiny/demo.png
	$(call refresh,$(TOPICS))

topics: sync  ## run the topic notebooks only and keep their outputs; some of them read what the demo left
	$(call refresh,$(TOPICS))

topic: sync  ## run one topic notebook and keep its outputs: make topic NAME=04_evaluation_analysis
	$(if $(filter $(NAME),$(TOPICS)),,$(error NAME is one of: $(TOPICS)))
	$(call refresh,$(NAME))

# each notebook runs in its own folder, as in Jupyter
define refresh
@mkdir -p outputs/topics
set -e; for name in $(1); do \
  $(PAPERMILL) notebooks/$$name.ipynb outputs/topics/$$name.ipynb --cwd notebooks --no-log-output; \
  $(BIN)/python -m helpers.export outputs/topics/$$name.ipynb; \
done
endef

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
  --custom-compile-command "make requirements"

# gradio 6.31 asks for pillow<13, but runs with 13: what users have stays, here and, by --no-deps, where it is installed
requirements: $(BIN)/uv  ## pin the dependencies of pyproject.toml: users' in requirements.txt, the rest in tests/
	$(COMPILE) pyproject.toml --output-file requirements.txt
	grep '^pillow==' requirements.txt | $(COMPILE) --group dev --constraints requirements.txt --overrides - \
	  --output-file tests/requirements.txt

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "This project needs Python 3.11 or 3.12; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, for example: make PYTHON=python3.11 $(MAKECMDGOALS)"; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

# for tests/test_page.py; no registry of Python packages has one. Without root, playwright downloads its own
.venv/browser: | .venv/installed-dev
	which chromium-headless-shell || which chromium || which google-chrome || if [ "$$(id -u)" = 0 ]; \
	  then apt-get -qq update && apt-get -qq --yes install --no-install-recommends chromium-headless-shell; \
	  else $(BIN)/playwright install --only-shell chromium; fi
	@touch $@

.venv/installed: requirements.txt | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python -r requirements.txt
	@touch $@

.venv/installed-dev: tests/requirements.txt .venv/installed
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r tests/requirements.txt
	@touch $@

# drawn anew when what draws it has changed
$(DATASET)/.drawn: $(filter-out helpers/tiny/pretrain.py,$(wildcard helpers/tiny/*.py helpers/tiny/*.json)) | .venv/installed
	rm -rf $(DATASET)
	@echo "Drawing 2,528 packages: 75 seconds on two cores."
	$(BIN)/python -m helpers.tiny.packages $(DATASET) --train 2400 --validation 128 --seed 0
	@touch $@
