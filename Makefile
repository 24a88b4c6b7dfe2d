# A newcomer needs only `make demo` and `make test`.
# PYTHON=python3.12 names the interpreter (default: the newest installed of 3.13, 3.12 and 3.11). TORCH=cpu takes the
# smaller build of torch for CPUs, TORCH=URL or TORCH=FOLDER another index or folder (docs/install.md).
PYTHON ?=
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
SEED ?= 21

.PHONY: demo test test-all test-random test-lowest test-gpu test-viewers map map-cuda map-test docs viewers lint install resolve dist dist-test clean

install:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' sh install/install.sh $(VENV)

# A chest with four tumours, segmented through Holoscan and compared with its truth; SEED=N draws another.
demo: install
	@rm -rf $(DEMO)
	$(BIN)/ctflow phantom $(DEMO)/case --seed $(SEED) --tumours 4
	$(BIN)/python app -i $(DEMO)/case/ct -o $(DEMO)/out
	@$(BIN)/ctflow evaluate $(DEMO)/case --results $(DEMO)/out --least-dice 0.8 > $(DEMO)/evaluation.txt; \
	    code=$$?; sed '$$d' $(DEMO)/evaluation.txt; exit $$code
	@sh install/next_steps.sh $(DEMO)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One process per core (WORKERS), each with one thread; whole processes before the many small tests.
# Types and import direction are architecture tests: they need a wheel's layout.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25
test: lint
	$(PYTEST) -m "not gpu and not map and not viewers and not exhaustive"

# Everything that `make test` runs, the exhaustive matrices, and the coverage of tests/unit (docs/testing.md).
test-all: lint
	$(PYTEST) -m "not gpu and not map and not viewers" --cov --cov-report=term-missing

# OHIF and its readers of SEG for tests/viewers, from npm; without them those tests are skipped.
viewers:
	cd tests/viewers && npm ci && npm run build && ./get_ohif.sh 3.13.2

# Every geometry in every form in three versions of OHIF. CTFLOW_RECORD=docs/results/viewers.json keeps what they show.
test-viewers: install viewers
	tests/viewers/get_ohif.sh 3.12.10 3.11.1
	[ -d build/itkwasm ] || $(BIN)/uv pip install --target build/itkwasm itkwasm-dicom==7.6.4
	$(BIN)/python -m pytest tests/viewers --durations=10

# `make test` tries the same random examples everywhere; this draws new ones for ten minutes and prints its seeds.
# Options: SEARCH='--seed N --minutes M tests/unit/window'
test-random: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/random_search.py $(SEARCH)

# Tries an engine on this GPU and writes gpu-proof/record.json (docs/tensorrt.md).
# Options: PROVE='--engine tensorrt-rtx --ct DIR'
test-gpu: install
	$(BIN)/python benchmarks/prove_gpu.py --out gpu-proof $(PROVE)

# The container, for CPUs and for NVIDIA GPUs: image, OCI archive, SBOM and licences in build/map (docs/map.md). Options:
# MAP='--model PATH'; MAP_TORCH=pip, cpu, URL or FOLDER names where the image's torch comes from (default: for CPUs as
# .venv's, if that is for CPUs; for GPUs pip's index).
MAP_TORCH ?=
map: install
	PYTHON=$(BIN)/python TORCH='$(MAP_TORCH)' MAP/build.sh $(MAP)

map-cuda: install
	PYTHON=$(BIN)/python TORCH='$(MAP_TORCH)' MAP/build.sh --flavour cuda $(MAP)

# Runs it, and packages the application with holoscan-cli; needs podman in addition to what `make map` needs.
map-test: install
	$(BIN)/python -m pytest -m map tests/map --durations=10

# Resolves every combination of Python, build of torch and extra, without installing: needs the ordinary index.
resolve: install
	$(BIN)/python install/resolve.py

# The oldest versions that pyproject.toml admits, in an environment of their own: 3 GB of torch. Which tests: LOWEST=...
LOWEST ?= tests/unit tests/contract
test-lowest: install
	UV=$(BIN)/uv sh install/lowest.sh .venv-lowest
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n auto --dist loadfile -m "not gpu and not map and not viewers and not e2e" $(LOWEST)

# The documentation site in build/docs; a broken link or anchor fails. Its search needs a web server:
# .venv/bin/python -m http.server -d build/docs. Not with --quiet: mkdocs would not count warnings.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "the documentation is in build/docs/index.html"

# Wheel and source archive in dist/; dist-test tries both without the checkout.
dist: install
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

dist-test: dist
	PYTHON=$(BIN)/python TORCH='$(TORCH)' bash install/try_dist.sh

clean:
	@[ ! -e $(VENV) ] || touch $(VENV)/.incomplete # an interrupted removal leaves nothing that is taken for whole
	rm -rf $(VENV)/bin
	rm -rf $(VENV) .venv-lowest $(DEMO) gpu-proof build dist *.egg-info src/*.egg-info .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
