# make demo          sample images with the bundled models; convert a checkpoint in OpenAI's format, with --check
# make test          lint, type checks, tests
# make test-newest   tests/laws and a training run with the newest Python here and the newest packages, in .venv-newest
# make test-aot      compile small programs for H100 and TPU, without the devices, by their compilers in .venv-aot
# make wheel-check   build the package and test the wheel in an empty environment
# Each creates .venv if necessary; PYTHON selects the interpreter (3.11 or newer).

PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
NEWEST ?= $(shell for name in python3.14 python3.13 python3.12 \
	$$(ls -dr "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3 2>/dev/null); do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$name" && break; done)
BIN := .venv/bin

.PHONY: demo test test-newest test-newest-quick test-aot lint types format constraints wheel-check clean

demo: .venv/.ready-demo
	rm -rf demo
	$(BIN)/python -m convert cm_jax/assets/emoji16_cd.pt demo/emoji16_cd --check
	$(BIN)/python sample.py demo/emoji16_cd --labels all --steps 2 --output demo/converted.png
	$(BIN)/python sample.py --labels all --steps 1 --output demo/one_step.png
	$(BIN)/python sample.py --labels all --steps 2 --output demo/two_steps.png
	@echo "Wrote demo/one_step.png, demo/two_steps.png and demo/converted.png."

test: lint types
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# PyTorch is left out: its newest release needs gigabytes, and what compares with it is tested by make test.
test-newest: NEWEST_TESTS := tests/laws tests/runs/test_training.py
# What depends most on versions: type hints, JAX's extension interfaces, meshes, pytrees, optax, files. For CI.
test-newest-quick: NEWEST_TESTS := $(addprefix tests/laws/test_,kernels.py serialization.py settings_files.py \
	registration.py model_pytree.py optimizers_and_ema.py single_file.py other_platforms.py \
	training_devices.py::test_devices_do_not_change_the_result) \
	tests/runs/test_training.py::test_a_run_leaves_all_that_it_promises
test-newest test-newest-quick: .venv-newest/.ready
	.venv-newest/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(NEWEST_TESTS)

.venv-newest/.ready: pyproject.toml
	@test -n "$(NEWEST)" || { echo "No Python 3.12 or newer found: install one, or run make NEWEST=/path/to/python3." >&2; exit 2; }
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip
	.venv-newest/bin/pip install --quiet -e '.[test-jax]'
	@touch $@

test-aot: .venv-aot/.ready
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -q -n 2 --dist worksteal tests/laws/test_compiled_for_devices.py

# The compilers beside the packages of .venv, not in it: JAX looks for devices wherever their compilers are installed.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-aot/.ready: pyproject.toml constraints.txt | .venv/.ready-dev
	$(BIN)/python -m venv .venv-aot
	echo "import site; site.addsitedir('$$($(BIN)/python $(PACKAGES))')" > $$(.venv-aot/bin/python $(PACKAGES))/dev.pth
	.venv-aot/bin/python -m pip install --quiet -c constraints.txt -e '.[aot]'
	@touch $@

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m tools.check_words

types: .venv/.ready-dev
	$(BIN)/pyright

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or run make PYTHON=/path/to/python3." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.ready-demo: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[convert]'
	@touch $@

.venv/.ready-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.ready-demo

# Pinned versions for Python 3.11 and newer. PyTorch is pinned manually.
constraints: .venv/.ready-dev
	$(BIN)/pip install --quiet uv
	echo "torch==2.13.0; python_version < '0'" > .venv/without-torch.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra train --extra demo --extra aot --universal --python-version 3.11 \
		--no-header --no-annotate --override .venv/without-torch.txt --quiet -o constraints.txt
	sed -i '/^-e /d; /^torch==/d' constraints.txt
	echo "torch==2.13.0" >> constraints.txt

wheel-check: .venv/bin/python
	tools/check_wheel.sh $(BIN)/python

clean:
	rm -rf .venv .venv-newest .venv-aot demo
