# One line a target; `make help` prints them. PYTHON picks the interpreter the environment is made from.
PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= The three things a good library needs are
BIN := $(VENV)/bin
BUILD := build/dev
SANITIZED := build/sanitize
CPP_FILES = $(shell find src/dseek/ops/csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inc')

# The kernels are built by whatever cmake and ninja the environment holds; PATH goes first so that both are found.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help venv dev native run test browser cluster mooncake rows sanitized sanitize lint format flags bench clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# Without --no-compile pip translates ten thousand files of which few are ever imported: half a minute.
venv: $(VENV)/.native ## make .venv with PyTorch, dseek and its native kernels
dev: $(VENV)/.dev ## the same, with everything that tests, lint and evaluation need

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile "cmake>=3.25" "nanobind>=2.4" "ninja>=1.11" "scikit-build-core>=0.11"
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable .
	touch $@

$(VENV)/.native: $(VENV)/.installed CMakeLists.txt $(CPP_FILES)
	$(MAKE) native || echo "dseek: no native kernels (see above); dseek runs, slowly, on the PyTorch reference"
	touch $@

$(VENV)/.dev: $(VENV)/.native $(VENV)/.extras
	touch $@

$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[dev,eval]"
	touch $@

native: $(VENV)/.installed ## build the kernels and put them beside the sources (src/dseek/_native*.so)
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build $(BUILD)
	cmake --install $(BUILD) --prefix src

run: venv ## bring the embedded model, measure this machine, print the plan, answer a prompt
	$(BIN)/dseek pull smollm2
	$(BIN)/dseek doctor
	$(BIN)/dseek plan smollm2
	$(BIN)/dseek generate smollm2 "$(PROMPT)"

test: dev ## the tests, two files at a time; then those that type into a terminal, alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/cli/test_chat.py
	$(BIN)/python -m pytest tests/cli/test_chat.py

browser: dev ## the web page in Chromium (installed by apt where it is missing and this is root)
	command -v chromium >/dev/null || { [ "$$(id -u)" -eq 0 ] && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }
	$(BIN)/python -m pytest -m browser tests/serve

cluster: dev ## what starts a Ray cluster, or nodes of a training in namespaces of their own (minutes; root)
	$(BIN)/python -m pytest -m cluster tests/serve tests/train

mooncake: dev ## the process group over Mooncake's transfer engine (installed here; libibverbs by apt where root may)
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[rdma]"
	ldconfig -p | grep -q libibverbs.so.1 || { [ "$$(id -u)" -eq 0 ] && apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends libibverbs1 >/dev/null; }
	$(BIN)/python -m pytest -m mooncake tests/parallel

rows: dev ## run benchmark rows on their smallest sizes, to see that they work (minutes)
	$(BIN)/python -m pytest -m rows tests/benchmarks

sanitized: dev ## build the kernels with AddressSanitizer
	@test -e "$$(g++ -print-file-name=libasan.so)" || { echo "sanitize: g++ has no libasan.so; install the one of its version" >&2; exit 1; }
	cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=g++ -DDSEEK_SANITIZE=ON \
	    -DDSEEK_VARIANTS="$(shell $(BIN)/python -c 'from dseek.ops import native as n; print(*n.require().variants(), sep=";")')" \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build $(SANITIZED) --parallel $(shell nproc)

sanitize: sanitized ## run what hunts for memory errors with them
	$(BIN)/python -m pytest -n 2 -m sanitizer tests/sanitizer

lint: dev ## ruff, mypy, the import table, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: dev ## rewrite the sources as ruff and clang-format want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

flags: dev ## rewrite tests/contracts/flags.json after a deliberate change of the command line
	$(BIN)/python -m tests.contracts.flags --write

bench: dev ## run the quick benchmarks and write the table that the README shows
	$(BIN)/python -m benchmarks quick

clean: ## remove the environment, the builds and the caches of the tools
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f src/dseek/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
