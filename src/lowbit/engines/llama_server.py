"""llama.cpp's server as a process of its own: ``python -m lowbit.engines.llama_server --model X.gguf --port N``.

The server of the ``xllamacpp`` package runs in it, on the given port, until SIGTERM. How its threads wait for each
other is OpenMP's, by the environment that :mod:`lowbit.gateway.launch` gives it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from typing import Any

__all__ = ["KEY_VARIABLE", "build_params", "main"]

KEY_VARIABLE = "LOWBIT_ENGINE_KEY"
"""Where the key is passed that every request but ``/health`` must carry: command lines are for all to see."""

_KV_TYPES = {
    "f32": "GGML_TYPE_F32",
    "f16": "GGML_TYPE_F16",
    "bf16": "GGML_TYPE_BF16",
    "q8_0": "GGML_TYPE_Q8_0",
    "q5_1": "GGML_TYPE_Q5_1",
    "q5_0": "GGML_TYPE_Q5_0",
    "q4_1": "GGML_TYPE_Q4_1",
    "q4_0": "GGML_TYPE_Q4_0",
    "iq4_nl": "GGML_TYPE_IQ4_NL",
}
_FLASH_ATTENTION = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}


def build_parser() -> argparse.ArgumentParser:
    """The arguments; see :mod:`lowbit.engines.flags` for where they come from."""
    parser = argparse.ArgumentParser(prog="lowbit.engines.llama_server", allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=0, help="tokens of each request; 0: what the model was made for")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--threads-batch", type=int, default=0, help="threads of prompts; 0: as --threads")
    parser.add_argument("--batch", type=int, default=2048, help="tokens computed together at most")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens computed in one piece at most")
    parser.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--kv-dtype", choices=sorted(_KV_TYPES), default="f16")
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("--poll", type=int, default=0, help="0 to 100: how long threads spin before they sleep")
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--prefix-cache-mib", type=int, default=0)
    parser.add_argument("--cache-reuse", type=int, default=0, help="fewest tokens of a passage moved within the cache")
    parser.add_argument("--ngram-draft", type=int, default=0, help="tokens drafted by prompt lookup; 0: none")
    parser.add_argument("--ngram-match", type=int, default=12, help="tokens that have to be the same as before")
    parser.add_argument("--mmproj")
    parser.add_argument("--draft-model")
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--rerank", action="store_true")
    parser.add_argument("--verbosity", type=int, default=1)
    return parser


def build_params(arguments: argparse.Namespace) -> Any:
    """``xllamacpp.CommonParams`` of the arguments."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model
    if arguments.alias:
        params.model_alias = {arguments.alias}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.n_parallel = arguments.parallel
    params.n_ctx = arguments.context * arguments.parallel  # llama.cpp divides it among the slots
    params.n_gpu_layers = arguments.gpu_layers
    kind = getattr(xllamacpp.ggml_type, _KV_TYPES[arguments.kv_dtype])
    params.cache_type_k = params.cache_type_v = kind
    params.cache_prompt = not arguments.no_prefix_cache
    params.cache_ram_mib = arguments.prefix_cache_mib
    params.n_batch = arguments.batch
    params.n_ubatch = min(arguments.ubatch, arguments.batch)
    flash = f"LLAMA_FLASH_ATTN_TYPE_{_FLASH_ATTENTION[arguments.flash_attention]}"
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, flash)
    params.n_cache_reuse = arguments.cache_reuse
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)))
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = arguments.threads_batch or threads
    params.cpuparams.poll = params.cpuparams_batch.poll = arguments.poll
    if key := os.environ.pop(KEY_VARIABLE, ""):
        params.api_keys = [key]
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.endpoint_props = False
    params.ui = False
    params.ctx_shift = False
    params.fit_params = False
    params.verbosity = arguments.verbosity
    params.n_threads_http = arguments.parallel + 4
    if arguments.mmproj:
        params.mmproj.path = arguments.mmproj
    if arguments.draft_model:
        params.speculative.draft.mparams.path = arguments.draft_model
        params.speculative.draft.n_max = arguments.draft_tokens
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    if arguments.ngram_draft:
        params.speculative.ngram_simple.size_n = arguments.ngram_match
        params.speculative.ngram_simple.size_m = arguments.ngram_draft
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    if arguments.embedding or arguments.rerank:
        params.embedding = True
    if arguments.rerank:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    return params


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parsed = build_parser().parse_args(arguments)
    try:
        import xllamacpp
    except ImportError:
        print("llama.cpp is not installed: pip install 'lowbit[serve]'", file=sys.stderr)
        return 2
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())
    try:
        server = xllamacpp.Server(build_params(parsed))
    except RuntimeError as error:
        print(f"cannot serve {parsed.model}: {error}", file=sys.stderr)
        return 1
    print(f"listening at {server.listening_address}", flush=True)
    leave.wait()
    # The library's own shutdown waits for every stream; the gateway has drained them already.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
