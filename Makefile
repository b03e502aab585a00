# Everything runs in .venv, which the first target that needs it builds from requirements.lock.
# Another interpreter or folder: make venv PYTHON=/path/to/python VENV=.venv-other   More options for pytest: make test ARGS="-k evidence"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-long test-matrix lint demo elbo_estimators elbo_gap posterior_quality latent_space blurry_samples em_gmm em_to_vae benchmark_em benchmark_checks benchmark_posteriors benchmark_autoguides gauntlet coverage mutants lock dist clean

PYTHON ?=
# The oldest and the newest Python supported, which come with the two majors of ArviZ.
PYTHONS ?= 3.11 3.13
ARGS ?=
VENV ?= .venv
# Where this is set, every process compiles torch and its company anew, which takes as long as many tests.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_VERSION := uv>=0.8,<1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z_-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## Build .venv with the exact versions of requirements.lock

# Prints the first interpreter that runs, is of a supported version and can make virtual environments. Running it
# tells more than finding it: a pyenv shim is found for every version and runs for the chosen one only.
define FIND_PYTHON
found= ; lame= ; \
for candidate in $(if $(PYTHON),"$(PYTHON)") python3.11 python3.12 python3.13 python3; do \
	"$$candidate" --version >/dev/null 2>&1 || continue; \
	"$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
	lame=$${lame:-$$candidate}; \
done; \
if [ -z "$$found" ] && [ -n "$$lame" ]; then \
	echo "$$lame cannot make virtual environments: install its venv module (on Debian and Ubuntu" \
		"'apt install python3-venv'), then run this again." >&2; exit 1; \
elif [ -z "$$found" ]; then \
	echo "No Python from 3.11 to 3.13 was found: install one, or name it with 'make venv PYTHON=/path/to/python'." >&2; \
	exit 1; \
fi
endef

define ENSURE_UV
if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	$(FIND_PYTHON); \
	echo "Building $(VENV) with $$("$$found" --version) ($$found)"; \
	"$$found" -m venv --clear $(VENV); \
fi; \
$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV_VERSION)'
endef

# The stamp is written last, so that an interrupted installation is taken up again by the next make.
$(STAMP): requirements.lock pyproject.toml
	@rm -f $@
	@$(ENSURE_UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@$(BIN)/uv pip check --quiet --python $(BIN)/python
	@touch $@

test: $(STAMP) ## Run the tests and the examples in docstrings (ARGS="..." goes to pytest)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-long: $(STAMP) ## Run the long tests that `make test` leaves out: whole analyses, chains, killed runs
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m long $(ARGS)

# Names of the interpreters for PYTHONS in turn: a version is looked for on the path, then where pyenv has its own.
define FIND_PYTHONS
interpreters=() ; \
for wanted in $(PYTHONS); do \
	found= ; \
	for candidate in "$$wanted" "python$$wanted" "$${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$wanted".*/bin/python; do \
		if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "No Python $$wanted that can make virtual environments was found: install one, or name those to test" \
			"on with 'make test-matrix PYTHONS=\"3.11 /path/to/python3.13\"'." >&2; exit 1; \
	fi; \
	interpreters+=("$$found"); \
done
endef

test-matrix: ## Run the tests on Python 3.11 and 3.13, each in its .venv-VERSION (PYTHONS="3.12 /a/python" for others)
	@$(FIND_PYTHONS); \
	failed= ; \
	for python in "$${interpreters[@]}"; do \
		version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "Python $$version ($$python)"; \
		$(MAKE) --no-print-directory test VENV=".venv-$$version" PYTHON="$$python" || failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "The tests fail on Python$$failed." >&2; exit 1; fi

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(STAMP) ## Run the demonstration
	$(BIN)/pyro-vae demo

elbo_estimators: $(STAMP) ## Measure which ELBO estimator to train with (ARGS=--full for the long run)
	$(BIN)/python -m analyses.elbo_estimators $(ARGS)

elbo_gap: $(STAMP) ## Split the ELBO gap of VAEs into approximation and amortisation (ARGS=--full for long)
	$(BIN)/python -m analyses.elbo_gap $(ARGS)

posterior_quality: $(STAMP) ## Can this posterior be trusted? k-hat, HMC, calibration (ARGS="..." goes to the script)
	$(BIN)/python -m analyses.posterior_quality $(ARGS)

latent_space: $(STAMP) ## Read the latent space: paths, attributes, units, features (ARGS="..." goes to the script)
	$(BIN)/python -m analyses.latent_space $(ARGS)

blurry_samples: $(STAMP) ## What makes samples blurry? One suspect at a time (ARGS="..." goes to the script)
	$(BIN)/python -m analyses.blurry_samples $(ARGS)

em_gmm: $(STAMP) ## Fit a Gaussian mixture by EM and look at its bound (ARGS="..." goes to the script)
	$(BIN)/python -m analyses.em_gmm $(ARGS)

em_to_vae: $(STAMP) ## Maximise one bound from EM to the VAE (ARGS="..." goes to the script)
	$(BIN)/python -m analyses.em_to_vae $(ARGS)

benchmark_em: $(STAMP) ## Time EM beside scikit-learn's on a small grid (ARGS="--sizes 100000" for another)
	$(BIN)/python -m benchmarks.em $(or $(ARGS),--quick)

benchmark_checks: $(STAMP) ## Measure which check sees which fault, and write docs/posterior_checks.md
	$(BIN)/python -m benchmarks.posterior_checks $(ARGS)

benchmark_posteriors: $(STAMP) ## Every way to a posterior on real ones, and write docs/posteriors.md (ARGS="--only garch")
	$(BIN)/python -m benchmarks.posteriors --out docs/posteriors.md $(ARGS)

benchmark_autoguides: $(STAMP) ## Ask every tool about each of Pyro's autoguides, and write docs/autoguides.md
	$(BIN)/python -m benchmarks.autoguides $(ARGS)

gauntlet: $(STAMP) ## Compare a thousand random programs with their truth (ARGS="--programs 100" for fewer)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.random_programs $(ARGS)

coverage: $(STAMP) ## Ask how often every stated error holds (ARGS="--replications 200 --only evidence" for fewer)
	$(BIN)/python -m benchmarks.coverage $(ARGS)

mutants: $(STAMP) ## Spoil one formula after another and ask whether a test notices (ARGS="--only em" for some)
	$(BIN)/python -m benchmarks.mutants $(ARGS)

# What conda installs is Python itself; the rest goes through pip with the very requirements of pyproject.toml,
# because conda's names and builds of torch differ and tests could not compare them.
define ENVIRONMENT
import tomllib
with open("pyproject.toml", "rb") as file:
    whole = tomllib.load(file)
project = whole["project"]
requirements = project["dependencies"] + whole["dependency-groups"]["dev"]
print("# Written by `make lock` from pyproject.toml; edit that file instead.")
print("name: pyro-vae\nchannels:\n  - conda-forge\n  - nodefaults\ndependencies:")
print(f'  - "python{project["requires-python"]}"\n  - pip\n  - make\n  - pip:')
for requirement in requirements:
    print(f'      - "{requirement}"')
print("      - -e .")
endef
export ENVIRONMENT

lock: ## Write requirements.lock and environment.yml from pyproject.toml (ARGS=--upgrade for newer versions)
	@$(ENSURE_UV)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group dev --no-emit-index-url \
		--no-emit-find-links --custom-compile-command "make lock" $(ARGS) -o requirements.lock pyproject.toml
	$(BIN)/python -c "$$ENVIRONMENT" > environment.yml

# Unpacked beside nothing of the checkout, the wheel must bring its templates and types along.
define TRY_WHEEL
outside=$$(mktemp -d); trap 'rm -rf "$$outside"' EXIT; python=$$(cd $(BIN) && pwd)/python; \
"$$python" -m zipfile -e dist/*.whl "$$outside"; \
"$$python" -m tarfile -l dist/*.tar.gz | grep /tests/conftest.py >/dev/null; \
test -f "$$outside/pyro_vae/py.typed"; \
ls "$$outside"/pyro_vae/app/templates/*.j2; \
cd "$$outside"; \
PYTHONPATH="$$outside" "$$python" -c 'import pyro_vae, sys; sys.exit(not pyro_vae.__file__.startswith(sys.argv[1]))' "$$outside"; \
PYTHONPATH="$$outside" "$$python" -m pyro_vae demo --help
endef

dist: $(STAMP) ## Build sdist and wheel, and try the wheel outside the checkout
	rm -rf dist
	@$(ENSURE_UV)
	$(BIN)/uv build --quiet --python $(BIN)/python
	@$(TRY_WHEEL)

clean: ## Delete caches and built files (virtual environments and results stay)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
