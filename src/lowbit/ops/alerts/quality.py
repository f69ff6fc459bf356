"""Alerts: what quantization cost, and whether it pays."""

from __future__ import annotations

from lowbit.ops.alerts.types import AT, HERE, SEEN, TIER, Alert, Case

__all__ = ["QUALITY"]

QUALITY: tuple[Alert, ...] = (
    Alert(
        "LowbitQuantizationErrorHigh",
        "warning",
        "lowbit_quantization_error > $weight_error",
        "5m",
        "the weights of {{ $labels.model }}@{{ $labels.tier }} stray far from the original's",
        '{{ $value | printf "%.3g" }}',
        "The mean relative error of the quantized weights is above what the bits explain. Answers may be worse.",
        ("lowbit doctor PATH names the worst modules", "lowbit eval PATH --against ORIGINAL"),
        (
            "lowbit quantize ORIGINAL OUT --scheme W8A16, or smaller groups (--group-size 64)",
            "lowbit fit ORIGINAL OUT --size SIZE gives the worst modules more bits",
        ),
        Case(
            {f"lowbit_quantization_error{{{TIER}}}": "0.2x10"},
            8,
            SEEN,
            "0.2",
            {f"lowbit_quantization_error{{{TIER}}}": "0.1x10"},
        ),
    ),
    Alert(
        "LowbitCertificateMissing",
        "info",
        "lowbit_tier_bits < 16 unless on (job, instance, model, tier) lowbit_quantization_kl",
        "15m",
        "nobody measured what {{ $labels.model }}@{{ $labels.tier }} lost",
        "{{ $value | humanize }} bits",
        "The tier serves fewer than 16 bits, and its checkpoint carries no certificate: its quality is a guess.",
        ("lowbit inspect PATH",),
        (
            "lowbit quantize again, with --certify-tokens 4096",
            "or measure it, lowbit eval PATH --against ORIGINAL, and write `kl:` beside the tier in serve.yaml",
        ),
        Case(
            {f"lowbit_tier_bits{{{HERE}, {TIER}}}": "4x30"},
            20,
            {**AT, **SEEN},
            "4 bits",
            {f"lowbit_tier_bits{{{HERE}, {TIER}}}": "4x30", f"lowbit_quantization_kl{{{HERE}, {TIER}}}": "0.02x30"},
        ),
    ),
    Alert(
        "LowbitCertificateFailing",
        "warning",
        "lowbit_quantization_kl > $kl",
        "5m",
        "{{ $labels.model }}@{{ $labels.tier }} answers unlike the original",
        '{{ $value | printf "%.3g" }} nats per token',
        "The certificate in the checkpoint, measured on held-out text, says that its answers diverge from the "
        "original's.",
        ("lowbit inspect PATH", "lowbit doctor PATH names the worst modules"),
        (
            "calibrate on text like the task: lowbit quantize ORIGINAL OUT --calibration FILE",
            "more bits: --scheme W8A16, or lowbit fit ORIGINAL OUT --size SIZE",
        ),
        Case(
            {f"lowbit_quantization_kl{{{TIER}}}": "0.5x10"},
            8,
            SEEN,
            "0.5 nats per token",
            {f"lowbit_quantization_kl{{{TIER}}}": "0.02x10"},
        ),
    ),
    Alert(
        "LowbitSlowerThanBaseline",
        "warning",
        "(lowbit:inter_token_latency_seconds:mean_10m and on (model, tier) lowbit_tier_bits < 16)"
        " > on (model) group_left () $slower * min by (model) ("
        "avg_over_time(lowbit:inter_token_latency_seconds:mean_10m[1d]) and on (model, tier) lowbit_tier_bits >= 16)",
        "15m",
        "{{ $labels.model }}@{{ $labels.tier }} writes slower than the 16-bit tier of the last day",
        "{{ $value | humanizeDuration }} per token",
        "The quantized tier was taken for speed or memory, and gives no speed: its kernel is not in use, or the "
        "processor is the bottleneck. Only seen where a tier of 16 bits or more has answered within a day.",
        ("lowbit bench PATH ORIGINAL", "top: is the processor, not the GPU, at 100 %?"),
        ("lowbit tune CONFIG.yaml", "another format for this hardware: lowbit convert PATH OUT --format FORMAT"),
        Case(
            {
                f"lowbit_tier_bits{{{TIER}}}": "4x60",
                'lowbit_tier_bits{model="chat", tier="bf16"}': "16x60",
                f"lowbit_inter_token_latency_seconds_sum{{{TIER}}}": "0+2x60",
                f"lowbit_inter_token_latency_seconds_count{{{TIER}}}": "0+20x60",
                'lowbit_inter_token_latency_seconds_sum{model="chat", tier="bf16"}': "0+1x60",
                'lowbit_inter_token_latency_seconds_count{model="chat", tier="bf16"}': "0+20x60",
            },
            50,
            SEEN,
            "100ms per token",
            {
                f"lowbit_tier_bits{{{TIER}}}": "4x60",
                'lowbit_tier_bits{model="chat", tier="bf16"}': "16x60",
                f"lowbit_inter_token_latency_seconds_sum{{{TIER}}}": "0+1x60",
                f"lowbit_inter_token_latency_seconds_count{{{TIER}}}": "0+20x60",
                'lowbit_inter_token_latency_seconds_sum{model="chat", tier="bf16"}': "0+1x60",
                'lowbit_inter_token_latency_seconds_count{model="chat", tier="bf16"}': "0+20x60",
            },
        ),
    ),
)
