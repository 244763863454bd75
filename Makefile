# Each target does its own set-up: python3 (3.11 or newer) with its venv module is all it needs.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := core plugins/zlib plugins/zstd plugins/qatzip plugins/qpl plugins/uadk
BINDINGS := $(wildcard plugins/*/build_lib*.py plugins/*/lib*.h)

.PHONY: demo test prove lint bench bench-qemu bench-link qemu-matrix clean

demo: .venv/ready
	$(BIN)/python tools/demo.py

# Everything that this machine allows; the last lines say what was left out, and why.
test: lint
	$(BIN)/python -m pytest

# What takes long; tests/prove/README.md.
prove: .venv/ready
	$(BIN)/python -m pytest tests/prove

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python tools/bench.py
	$(BIN)/python tools/bench_qatzip.py

bench-qemu: .venv/ready
	$(BIN)/python tools/bench_qemu.py

bench-link: .venv/ready
	$(BIN)/python tools/bench_link.py

# Every QEMU release and machine with every other; writes the table of docs/qemu.md.
qemu-matrix: .venv/ready
	$(BIN)/python tools/qemu_matrix.py --write docs/qemu.md

# Compiled once, as pip does where it copies: Python may be told not to keep what it compiles.
.venv/ready: requirements-dev.txt $(BINDINGS) $(PACKAGES:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "multifd needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv || { echo "python3 came without venv: install the package python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt $(PACKAGES:%=-e ./%)
	$(BIN)/python -m compileall -q $(PACKAGES)
	touch $@

clean:
	rm -rf .venv .libqatzip .libqpl .qemu .mypy_cache .pytest_cache .ruff_cache
