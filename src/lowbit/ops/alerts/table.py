"""What lowbit watches for: every alert as data, from its expression to the command that mends its cause.

``$name`` in an expression is a threshold; names of metrics are checked against the gateway's declarations when rules
are made (:mod:`lowbit.ops.alerts.rules`).
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.ops.alerts.engines import ENGINES
from lowbit.ops.alerts.quality import QUALITY
from lowbit.ops.alerts.service import SERVICE
from lowbit.ops.alerts.types import Alert, Recorded, Threshold

__all__ = ["ALERTS", "RECORDED", "THRESHOLDS"]

ALERTS: tuple[Alert, ...] = (*SERVICE, *QUALITY, *ENGINES)

THRESHOLDS: Mapping[str, Threshold] = {
    "weight_error": Threshold(
        0.15,
        "a 4-bit grid in groups of 128 costs Gaussian weights a relative error of 0.10 by itself; half above that, "
        "something is wrong with the scales, or the bits are too few",
    ),
    "kl": Threshold(0.1, "0.1 nats per token are about 10 % of perplexity, twice the 5 % that 4 bits usually cost"),
    "slower": Threshold(1.25, "tokens per second below 80 % of the 16-bit tier's: quantization does not pay"),
    "memory_share": Threshold(0.9, "above 90 % of memory, an engine's next allocation may be its last"),
    "queue_share": Threshold(0.8, "a queue that is 80 % full refuses soon"),
    "queue_seconds": Threshold(10.0, "people leave a page that does nothing for ten seconds"),
    "first_token_seconds": Threshold(5.0, "set it to your objective: policy.ttft of the configuration"),
    "kv_share": Threshold(0.95, "a KV cache without room preempts requests, which are then computed again"),
    "restarts": Threshold(3.0, "an engine that is restarted three times in half an hour does not recover by itself"),
    "objective": Threshold(0.999, "share of requests that must not fail; the budget is what is left to 1"),
}
"""Name to number: ``lowbit alerts --set NAME=VALUE`` changes one."""

_ERRORS = (
    'sum by (model) (rate(lowbit_requests_total{status=~"5.."}[WINDOW]))'
    " / sum by (model) (rate(lowbit_requests_total[WINDOW]))"
)
RECORDED: tuple[Recorded, ...] = (
    *(
        Recorded(f"lowbit:errors:ratio_{window}", _ERRORS.replace("WINDOW", window))
        for window in ("5m", "30m", "1h", "6h", "3d")
    ),
    Recorded(
        "lowbit:inter_token_latency_seconds:mean_10m",
        "sum by (model, tier) (rate(lowbit_inter_token_latency_seconds_sum[10m]))"
        " / sum by (model, tier) (rate(lowbit_inter_token_latency_seconds_count[10m]))",
    ),
    Recorded(
        "lowbit:time_to_first_token_seconds:p95_10m",
        "histogram_quantile(0.95, sum by (model, tier, le) (rate(lowbit_time_to_first_token_seconds_bucket[10m])))",
    ),
    Recorded(
        "lowbit:queue_seconds:p95_10m",
        "histogram_quantile(0.95, sum by (model, le) (rate(lowbit_queue_seconds_bucket[10m])))",
    ),
    Recorded(
        "lowbit:tokens:rate_5m",
        'sum by (model, tier) (rate(lowbit_tokens_total{kind="completion"}[5m]))',
    ),
)
