# Engines and peers, each in an environment of its own under .venvs; none of this is part of `make test`.
.PHONY: test-vllm test-gptqmodel test-transformers bench-quantize engine-checkpoints

ENGINE_CHECKPOINTS := build/engines

engine-checkpoints: $(VENV)/.installed-dev
	$(BIN)/python tests/engines/make_checkpoints.py $(ENGINE_CHECKPOINTS)

test-transformers: engine-checkpoints  ## compressed-tensors checkpoints in transformers, in the project's environment
	$(BIN)/python tests/engines/transformers_check.py $(ENGINE_CHECKPOINTS) --formats compressed-tensors dense

test-vllm: engine-checkpoints  ## Every format and method in vLLM's CPU build
	$(BIN)/python tests/engines/environments.py vllm
	.venvs/vllm/bin/python tests/engines/vllm_check.py $(ENGINE_CHECKPOINTS)

test-gptqmodel: engine-checkpoints  ## GPTQ and AWQ checkpoints in transformers with GPTQModel
	$(BIN)/python tests/engines/environments.py gptqmodel
	.venvs/gptqmodel/bin/python tests/engines/transformers_check.py $(ENGINE_CHECKPOINTS) --formats gptq awq

bench-quantize: $(VENV)/.installed  ## Time and memory beside llm-compressor on a 1.1B Llama
	$(BIN)/python tests/engines/environments.py llmcompressor
	$(BIN)/python benchmarks/quantize.py --layers 1 3
