# Everything below works on a machine that has Python 3.11+ with pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := $(shell sed -n 's/^uv==//p' constraints.txt)

.PHONY: setup demo test check format clean stack stack-down

setup: $(VENV)/.installed

# uv installs in seconds what takes pip minutes; the same constraints serve both. Compiled once here, Ray's dozen processes start in half the time.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then ln -sf "$$(command -v uv)" $(BIN)/uv; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)" || true; fi
	if [ -x $(BIN)/uv ]; then \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; fi
	touch $@

demo: setup
	$(BIN)/memmc demo

# Prefect, a worker, MLflow and two Ray nodes on this machine, then the demo's steps through the deployments.
stack: setup
	$(BIN)/python infra/stack/stack.py up

stack-down: setup
	$(BIN)/python infra/stack/stack.py down

test: setup
	$(BIN)/python -m pytest -m "not slow" --durations=10
	$(BIN)/python -m pytest -m slow --durations=20

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pip check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .memmc memmc-demo build *.egg-info
