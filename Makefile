# make demo: prune the built-in model, evaluate before and after, write the report.
# make test: every test, two at a time.
# make torture: every hostile input, 200 signals and 28 races: half an hour. All set up their own environment first.
PYTHON ?= python3
VENV ?= .venv
# The version that the tests ran with. On a machine without a GPU a CPU build of it is enough.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
DEMO := demo-output/llama-6m-gqa-30

.PHONY: demo test torture clean

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*/*.* csrc/*/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO) $(DEMO).partial
	mkdir -p $(dir $(DEMO))
	$(BIN)/pyprune prune models/llama-6m-gqa $(DEMO) --method flap --ratio 0.3 \
		--calibration self --samples 128 --sequence-length 256 \
		--evaluate self --evaluation-length 256 --max-windows 64

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=40

torture: $(VENV)/installed
	PYPRUNE_HOSTILE=all $(BIN)/python -m pytest tests/hostile
	$(BIN)/python tests/torture

clean:
	rm -rf $(VENV) demo-output build
