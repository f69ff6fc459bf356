# Checks against the engines that run the checkpoints, and the benchmark against peers. Each has an environment of its
# own under .venvs, built on first use; none of it is part of `make test`.
ENGINES      := build/engines
ENVIRONMENT  := $(BIN)/python tests/engines/environments.py
ENGINE_MODEL ?= demo
BENCH        ?=

.PHONY: docs test-docs pictures test-ray test-engines test-vllm test-gptqmodel test-transformers bench-quantize bench-memory bench-gateway bench-gguf bench-tune test-llamacpp test-backup test-alerts test-deploy test-bitsandbytes test-hqq bench-accuracy

test-engines: test-transformers test-gptqmodel test-bitsandbytes test-hqq test-vllm  ## Every checkpoint format in every engine

test-transformers: $(ENGINES)/.made  ## compressed-tensors checkpoints in transformers
	$(ENVIRONMENT) llmcompressor
	.venvs/llmcompressor/bin/python tests/engines/transformers_check.py $(ENGINES) --formats compressed-tensors dense

test-gptqmodel: $(ENGINES)/.made  ## GPTQ and AWQ checkpoints in transformers with GPTQModel
	$(ENVIRONMENT) gptqmodel
	.venvs/gptqmodel/bin/python tests/engines/transformers_check.py $(ENGINES) --formats gptq awq

test-bitsandbytes: $(ENGINES)/.made  ## NF4, FP4 and LLM.int8() checkpoints in transformers with bitsandbytes
	$(ENVIRONMENT) bitsandbytes
	.venvs/bitsandbytes/bin/python tests/engines/transformers_check.py $(ENGINES) --formats bitsandbytes
	.venvs/bitsandbytes/bin/python tests/engines/bitsandbytes_check.py $(ENGINES)

test-hqq: $(ENGINES)/.made  ## HQQ checkpoints in transformers with hqq
	$(ENVIRONMENT) hqq
	.venvs/hqq/bin/python tests/engines/transformers_check.py $(ENGINES) --formats hqq

bench-accuracy: $(VENV)/.installed-dev  ## Accuracy of every method beside the peers'
	$(BIN)/python benchmarks/accuracy.py $(BENCH)

test-vllm: $(ENGINES)/.made  ## All checkpoints in vLLM's CPU build
	$(ENVIRONMENT) vllm
	.venvs/vllm/bin/python tests/engines/vllm_check.py $(ENGINES)

.PHONY: test-vllm-gateway
test-vllm-gateway: $(VENV)/.installed-dev  ## vLLM's CPU build behind the gateway: a dense and a W8A8 tier
	$(ENVIRONMENT) vllm
	$(BIN)/python tests/engines/vllm_gateway_check.py .venvs/vllm/bin/python

bench-quantize: $(VENV)/.installed-dev  ## Time and memory of quantization beside the peers'
	$(BIN)/python benchmarks/quantize.py $(BENCH)

bench-gateway: $(VENV)/.installed-dev  ## What the gateway costs
	$(BIN)/python benchmarks/gateway.py $(BENCH)

bench-memory: $(VENV)/.installed-dev  ## Predicted against measured memory: files, engines, quantization
	$(BIN)/python benchmarks/memory.py $(BENCH)

test-llamacpp: $(VENV)/.installed-dev  ## The types of GGUF mixes against those that llama.cpp chooses
	$(ENVIRONMENT) llamacpp
	$(BIN)/python tests/engines/mixes_check.py

bench-tune: $(VENV)/.installed-dev  ## What tuned settings gain over the defaults
	$(BIN)/python benchmarks/tune.py $(BENCH)

bench-gguf: $(VENV)/.installed-dev  ## GGUF files beside llama.cpp's own: accuracy, time, memory
	$(BIN)/python benchmarks/gguf_files.py $(BENCH)

docs: $(VENV)/.installed-dev  ## Build the documentation site into build/site
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet

test-docs: $(VENV)/.installed-dev  ## Run every command of the documentation (ports 8000 and 9000): PAGES='gguf fit' for some
	$(BIN)/python tests/docs/run_commands.py $(PAGES)

pictures: $(VENV)/.installed-dev  ## Draw the theory pages' pictures again, from the embedded model
	$(BIN)/python docs/theory/pictures.py

test-backup: $(VENV)/.installed-dev  ## Backups at an S3 and an SSH server on this machine (wants openssh-server)
	$(ENVIRONMENT) backup
	$(BIN)/python tests/ops/remote_check.py .venvs/backup

test-alerts: $(VENV)/.installed-dev  ## Alert rules in promtool and in a real Prometheus (wants Debian's prometheus)
	$(BIN)/python tests/ops/alerts_check.py

test-deploy: $(VENV)/.installed-dev  ## Deploy files against the schemas of Compose and Kubernetes
	$(ENVIRONMENT) deploy
	.venvs/deploy/bin/python tests/ops/deploy_check.py $(abspath $(BIN))/python

$(ENGINES)/.made: $(VENV)/.installed-dev $(shell find src -name '*.py') $(wildcard tests/engines/*.py)
	rm -rf $(ENGINES)
	$(BIN)/python tests/engines/make_checkpoints.py $(ENGINES) --model $(ENGINE_MODEL)
	@touch $@

.PHONY: bench-ray
test-ray: $(VENV)/.installed-dev  ## Serving and quantizing on a Ray cluster of several nodes on this machine
	$(ENVIRONMENT) ray
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 .venvs/ray/bin/python -m pytest -q -p no:cacheprovider \
		tests/engines/ray_check.py tests/engines/ray_quantize_check.py

bench-ray: $(VENV)/.installed-dev  ## What replicas on a Ray cluster gain and cost
	$(ENVIRONMENT) ray
	.venvs/ray/bin/python benchmarks/ray_serve.py $(BENCH)

.PHONY: test-clients soak
test-clients: $(VENV)/.installed-dev  ## LangChain, schemathesis and lm-eval against the gateway
	$(ENVIRONMENT) clients
	LOWBIT_PYTHON=$(abspath $(BIN))/python .venvs/clients/bin/python -m pytest -q -c /dev/null --rootdir tests/clients \
		--confcutdir tests/clients --import-mode=importlib -o python_files='*_check.py' tests/clients

soak: $(VENV)/.installed-dev  ## Minutes of load and faults on the gateway: SOAK='--minutes 5 --alerts'
	$(BIN)/python tests/gateway/soak.py $(SOAK)
