# make demo: prune the built-in model, evaluate before and after, write the report.
# make test: every test, two at a time.
# make test-fast: the same without the slow ones.
# make wheel: the source archive and the wheel for $(PYTHON) in dist/, with the CPU and the CUDA core; without PyTorch.
# make torture: every hostile input, 70 kills, 200 signals and 28 races: half an hour. All set up their own environment first.
PYTHON ?= python3
VENV ?= .venv
# The version that the tests ran with. On a machine without a GPU a CPU build of it is enough.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
DEMO := demo-output/llama-6m-gqa-30

DIST ?= dist
WHEEL_VENV ?= build/wheel-venv-$(notdir $(PYTHON))
WHEEL_BIN := $(abspath $(WHEEL_VENV))/bin
# Options of `python -m build`; --no-isolation builds with what WHEEL_VENV has and needs no network.
BUILD_OPTIONS ?=

.PHONY: demo test test-fast torture wheel clean

# Nothing is compiled to bytecode beforehand: of thousands of modules a few hundred are ever imported. The core is
# compiled while pip unpacks the libraries; what that left in build/ is linked again by the installation.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*/*.* csrc/*/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); extras = p['project']['optional-dependencies']; \
		open('$(VENV)/build.txt', 'w').write('\n'.join(p['build-system']['requires'])); \
		needed = [*p['project']['dependencies'], *extras['test'], *extras['data'], *extras['wheel']]; \
		open('$(VENV)/test.txt', 'w').write('\n'.join(r for r in needed if not r.startswith('pyprune[')))"
	$(PIP_INSTALL) -r $(VENV)/build.txt
	$(BIN)/python setup.py --quiet build_ext --inplace & \
		$(PIP_INSTALL) "$(TORCH)" && $(PIP_INSTALL) -r $(VENV)/test.txt && wait $$!
	$(PIP_INSTALL) --no-build-isolation -e ".[test]"
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO) $(DEMO).partial
	mkdir -p $(dir $(DEMO))
	$(BIN)/pyprune prune models/llama-6m-gqa $(DEMO) --method obs --ratio 0.3 \
		--calibration builtin --samples 32 --sequence-length 256 \
		--evaluate builtin --evaluation-length 256 --max-windows 32

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=40

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=40 -m "not slow"

torture: $(VENV)/installed
	PYPRUNE_HOSTILE=all $(BIN)/python -m pytest tests/hostile tests/passes/test_resume.py
	$(BIN)/python tests/torture

# Nothing but the `wheel` extra: installing the package with it would bring PyTorch.
$(WHEEL_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*project['optional-dependencies']['wheel'], sep='\n')" > $(WHEEL_VENV)/requirements.txt
	$(WHEEL_BIN)/python -m pip install --quiet -r $(WHEEL_VENV)/requirements.txt
	touch $@

# auditwheel tags the wheel with the oldest glibc that its symbols allow: on an older system it gets an older one.
# Without a C++ compiler there is no core, and the wheel is copied as it is.
wheel: $(WHEEL_VENV)/installed
	rm -rf build/wheel
	$(WHEEL_BIN)/python -m build --sdist --wheel --outdir build/wheel $(BUILD_OPTIONS)
	PATH="$(WHEEL_BIN):$$PATH" $(WHEEL_BIN)/python -m auditwheel repair --allow-pure-python-wheel \
		--wheel-dir $(DIST) build/wheel/*.whl
	mv build/wheel/*.tar.gz $(DIST)
	ls -lh $(DIST)

clean:
	rm -rf $(VENV) demo-output build
