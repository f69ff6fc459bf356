"""Alerts: memory, and the processes that run the models."""

from __future__ import annotations

from lowbit.ops.alerts.types import AT, HERE, PERCENT, PLAIN, SEEN, TIER, Alert, Case

__all__ = ["ENGINES"]

ENGINES: tuple[Alert, ...] = (
    Alert(
        "LowbitMemoryAboveBudget",
        "warning",
        "sum by (job, instance) (lowbit_engine_memory_bytes) / on (job, instance) lowbit_memory_budget_bytes > 1",
        "5m",
        "the engines of {{ $labels.instance }} hold more than their memory budget",
        PERCENT,
        "The gateway loads what is planned to fit; an engine holds more than was planned for it. Other models are "
        "unloaded sooner, and the kernel may kill an engine.",
        ("lowbit doctor URL", "GET /status: planned and resident memory of each tier"),
        (
            "less for the KV cache: `context`, `concurrency` or `kv_dtype: q8_0` of the tier (lowbit estimate PATH)",
            "fewer models at once: policy.idle_unload, or a tier of fewer bits",
        ),
        Case(
            {
                f'lowbit_engine_memory_bytes{{{HERE}, {TIER}, engine="llama.cpp"}}': "105x20",
                f"lowbit_memory_budget_bytes{{{HERE}}}": "100x20",
            },
            10,
            AT,
            "105%",
            {
                f'lowbit_engine_memory_bytes{{{HERE}, {TIER}, engine="llama.cpp"}}': "95x20",
                f"lowbit_memory_budget_bytes{{{HERE}}}": "100x20",
            },
        ),
    ),
    Alert(
        "LowbitMachineMemoryLow",
        "warning",
        "lowbit_memory_available_bytes / lowbit_memory_total_bytes < 1 - $memory_share",
        "5m",
        "little memory is left on {{ $labels.instance }} beside its engines",
        "{{ $value | humanizePercentage }} left",
        "Engines and other processes together have taken nearly all memory of the machine or container.",
        ("ps aux --sort=-rss | head: is another process large?", "lowbit doctor URL"),
        ("end what else runs there, or lower `memory:` in serve.yaml", "a higher memory limit of the container"),
        Case(
            {
                f"lowbit_memory_total_bytes{{{HERE}}}": "100x20",
                f"lowbit_memory_available_bytes{{{HERE}}}": "5x20",
            },
            10,
            AT,
            "5% left",
            {
                f"lowbit_memory_total_bytes{{{HERE}}}": "100x20",
                f"lowbit_memory_available_bytes{{{HERE}}}": "50x20",
            },
        ),
    ),
    Alert(
        "LowbitOutOfMemoryKill",
        "critical",
        "increase(lowbit_oom_kills_total[10m]) > 0",
        "0m",
        "the kernel killed a process for want of memory on {{ $labels.instance }}",
        PLAIN,
        "The machine or the container ran out of memory, and a process, most likely an engine, was killed. Its "
        "requests were started again elsewhere or failed.",
        ("dmesg | grep -i oom", "lowbit doctor URL"),
        (
            "plan again: lowbit estimate PATH --context N --concurrency N --memory SIZE",
            "lower `memory:` in serve.yaml so that the gateway leaves room, or give the container more",
        ),
        Case(
            {f"lowbit_oom_kills_total{{{HERE}}}": "0x5 1x3"},
            7,
            AT,
            "1",
            {f"lowbit_oom_kills_total{{{HERE}}}": "7x20"},
        ),
    ),
    Alert(
        "LowbitEngineEnded",
        "warning",
        "increase(lowbit_engine_crashes_total[10m]) + increase(lowbit_engine_hangs_total[10m]) > 0",
        "0m",
        "the engine of {{ $labels.model }}@{{ $labels.tier }} crashed or hung",
        PLAIN,
        "An engine's process ended, or stopped answering and was ended. The gateway starts it again; streams that had "
        "begun were cut.",
        ("the engine's log, in the directory that `logs:` of serve.yaml names", "dmesg | grep -i oom"),
        ("killed for memory: see LowbitOutOfMemoryKill", "otherwise lowbit verify PATH, and another engine version"),
        Case(
            {f"lowbit_engine_crashes_total{{{TIER}}}": "0x5 1x3", f"lowbit_engine_hangs_total{{{TIER}}}": "0x10"},
            7,
            SEEN,
            "1",
            {f"lowbit_engine_crashes_total{{{TIER}}}": "3x9", f"lowbit_engine_hangs_total{{{TIER}}}": "1x9"},
        ),
    ),
    Alert(
        "LowbitEngineRestarts",
        "critical",
        "increase(lowbit_engine_restarts_total[30m]) >= $restarts",
        "0m",
        "the engine of {{ $labels.model }}@{{ $labels.tier }} is restarted again and again",
        PLAIN,
        "The engine does not stay up. Its tier is of no use until the cause is gone.",
        ("the engine's log", "lowbit doctor PATH"),
        ("lowbit verify PATH; lowbit restore DEST OUT", "less context or concurrency where the log speaks of memory"),
        Case(
            {f"lowbit_engine_restarts_total{{{TIER}}}": "0 1 2 3 4x30"},
            20,
            SEEN,
            "4",
            {f"lowbit_engine_restarts_total{{{TIER}}}": "0x5 1x30"},
        ),
    ),
    Alert(
        "LowbitEngineLoadFailed",
        "warning",
        "increase(lowbit_engine_load_failures_total[15m]) > 0",
        "0m",
        "{{ $labels.model }}@{{ $labels.tier }} could not be loaded",
        PLAIN,
        "The engine did not become ready: a damaged checkpoint, a format it does not take, or too little memory.",
        ("lowbit doctor PATH", "the engine's log"),
        ("lowbit verify PATH, then lowbit restore DEST OUT or quantize again", "lowbit estimate PATH: does it fit?"),
        Case(
            {f"lowbit_engine_load_failures_total{{{TIER}}}": "0x5 1x3"},
            7,
            SEEN,
            "1",
            {f"lowbit_engine_load_failures_total{{{TIER}}}": "2x9"},
        ),
    ),
    Alert(
        "LowbitCircuitOpen",
        "warning",
        "lowbit_circuit_open == 1",
        "2m",
        "{{ $labels.model }}@{{ $labels.tier }} is out of use after failures in a row",
        PLAIN,
        "The tier failed several times in a row. Other tiers of the model answer, if it has any.",
        ("lowbit doctor URL", "the engine's log"),
        ("mend the engine; the gateway tries it again by itself (policy.cooldown)",),
        Case({f"lowbit_circuit_open{{{TIER}}}": "1x10"}, 5, SEEN, "1", {f"lowbit_circuit_open{{{TIER}}}": "0x10"}),
    ),
    Alert(
        "LowbitKvCacheFull",
        "warning",
        "lowbit_kv_cache_usage_ratio > $kv_share",
        "5m",
        "the KV cache of {{ $labels.model }}@{{ $labels.tier }} is full",
        PERCENT,
        "The engine has no room for more context: it makes requests wait, or throws finished work away and repeats it.",
        ("lowbit doctor URL", "lowbit estimate PATH --context N --concurrency N"),
        (
            "kv_dtype: q8_0 (llama.cpp) or fp8 (vLLM) halves it; flags.kv_offload takes host memory",
            "lower `context` or `concurrency`; flags.gpu_memory nearer to 1 (vLLM)",
        ),
        Case(
            {f"lowbit_kv_cache_usage_ratio{{{TIER}}}": "0.99x10"},
            8,
            SEEN,
            "99%",
            {f"lowbit_kv_cache_usage_ratio{{{TIER}}}": "0.5x10"},
        ),
    ),
    Alert(
        "LowbitEngineHoldsBack",
        "info",
        "lowbit_engine_waiting > 0",
        "10m",
        "the engine of {{ $labels.model }}@{{ $labels.tier }} holds requests back that the gateway gave it",
        "{{ $value | humanize }} requests",
        "The gateway gives the engine more at once than it takes: its slots or its KV cache are full. Engines that do "
        "not tell the use of their KV cache (llama.cpp) show it here.",
        ("lowbit doctor URL",),
        ("`concurrency` of the tier as many as the engine has slots for", "as for LowbitKvCacheFull"),
        Case(
            {f"lowbit_engine_waiting{{{TIER}}}": "3x20"},
            15,
            SEEN,
            "3 requests",
            {f"lowbit_engine_waiting{{{TIER}}}": "0x20"},
        ),
    ),
)
