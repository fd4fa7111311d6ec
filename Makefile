# `make plan` answers the main question on a shipped scenario; `make check` is what to run before a commit, and
# `make test` runs all tests. Each sets up what it needs inside this folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SCENARIO ?= a6000-qwen2.5-7b
SLO ?= --slo ttft:p95:500 --slo tpot:p95:60

unexport PYTHONDONTWRITEBYTECODE  # tests start processes, each of which would compile what it imports

.PHONY: plan check test unit inferencex live-results lint types tree benchmark identity-long parity-ladder parity-long docs vllm litellm prometheus build clean

plan: $(VENV)/.installed
	$(BIN)/servecast plan $(SCENARIO) $(SLO) --report out/plan-$(SCENARIO).html

# Needs neither vLLM nor a quiet machine: five CPU minutes.
check:
	$(MAKE) -j2 lint types
	$(MAKE) unit

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not vllm and not live and not slow" -n logical --dist loadfile --no-loadscope-reorder

# Live tests judge predictions against real servers on this machine: last, since they want it for themselves.
test: check vllm litellm prometheus
	$(BIN)/python -m pytest -m "(vllm or slow) and not live" -n logical --dist loadfile
	$(BIN)/python -m pytest -m live

# Predicts every run of InferenceX, a few minutes, and renews what the accuracy page says of them.
inferencex: $(VENV)/.installed-test
	mkdir -p out
	$(BIN)/servecast reproduce inferencex-vllm --json > out/inferencex-vllm.json
	mv out/inferencex-vllm.json docs/results/
	$(BIN)/python docs/generate.py

# Measures the committed results of live runs that need no GPU anew; takes twenty minutes, and wants a machine
# that does nothing else: it keeps no result otherwise.
live-results: $(VENV)/.installed-test vllm
	$(BIN)/python tests/live/measure_results.py
	$(BIN)/python docs/generate.py

lint: $(VENV)/.installed-test tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .tree && ../$(BIN)/lint-imports --no-logo ../pyproject.toml

types: $(VENV)/.installed-test tree
	MYPYPATH=.tree $(BIN)/mypy -p servecast

# The real vLLM, in an environment of its own, for the comparison of schedulers.
vllm:
	PYTHON=$(PYTHON) bash tools/install_vllm.sh
	bash tools/unpack_vllm.sh 0.20 0.23 0.33

# What stands around vLLM in a live test: a proxy before it, and a server that scrapes it.
litellm:
	PYTHON=$(PYTHON) bash tools/install_litellm.sh

prometheus:
	bash tools/install_prometheus.sh

# Every minor release's own scheduler against its rule set: unpacks the Python sources of 14 wheels (500 MB
# on disk, 5 GB of downloads) and takes a quarter of an hour.
parity-ladder: $(VENV)/.installed-test vllm
	bash tools/unpack_vllm.sh $$($(BIN)/python -c 'from servecast.sim.engine.rules import RELEASES; print(*RELEASES)')
	$(BIN)/python docs/parity_page.py --ladder

parity-long: $(VENV)/.installed-test vllm
	$(BIN)/python docs/parity_page.py --long

# 20,000 random cases, a quarter of an hour.
identity-long: $(VENV)/.installed-test
	$(BIN)/python tests/sim/engine/long_identity.py

benchmark: $(VENV)/.installed-test
	$(BIN)/python tests/speed/measure.py
	$(BIN)/python docs/generate.py

docs: $(VENV)/.installed-test
	$(BIN)/pip install -q '.[docs]'
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The engine is compiled as it is installed. Where there is no C compiler, one comes from PyPI (ziglang).
# -E: pip hides what is installed here from what it builds with. Where the compiler fails, the engine runs
# interpreted.
COMPILED := pyproject.toml setup.py $(wildcard sim/*/*.pxd) $(shell grep -lx "import cython" sim/*/*.py)
define install
	@command -v $${CC:-cc} > /dev/null || $(BIN)/pip install -q ziglang || true
	@if ! command -v $${CC:-cc} > /dev/null && $(BIN)/python -m ziglang version > /dev/null 2>&1; then \
	  export CC="$(CURDIR)/$(BIN)/python -E -m ziglang cc"; fi; $(BIN)/pip install -q -e '$(1)'
	@$(BIN)/servecast --version | grep -q "engine compiled" || echo "The engine was not compiled and runs \
	interpreted, many times slower. Install gcc or clang, then run make -B build."
endef

$(VENV)/.installed: $(COMPILED) | $(VENV)/bin/python
	$(call install,.)
	touch $@

$(VENV)/.installed-test: $(COMPILED) | $(VENV)/bin/python
	$(call install,.[test])
	touch $@ $(VENV)/.installed

# After a change of a compiled module; `make check` does it, too.
build: $(VENV)/.installed-test

# Type checkers and import-linter do not follow setuptools' package mapping: give them the tree that it means.
tree:
	rm -rf .tree && mkdir -p .tree
	cp -rp servecast .tree/
	cp -rp sim calibrate validate .tree/servecast/
	mkdir .tree/servecast/scenarios && cp -rp scenarios/__init__.py scenarios/make .tree/servecast/scenarios/

clean:
	rm -rf .venv .venv-vllm .venv-litellm .prometheus .tree out
