"""Alerts: what users notice: errors, queues, slow answers."""

from __future__ import annotations

from lowbit.ops.alerts.types import AT, HERE, PERCENT, PLAIN, SECONDS, SEEN, TIER, Alert, Case

__all__ = ["SERVICE"]


def _burn(rate: str, long: str, short: str) -> str:
    return (
        f"lowbit:errors:ratio_{long} > {rate} * (1 - $objective)"
        f" and lowbit:errors:ratio_{short} > {rate} * (1 - $objective)"
    )


def _failing(share: int) -> dict[str, str]:
    """Series of requests of which ``share`` in a hundred fail."""
    return {
        'lowbit_requests_total{model="chat", status="200"}': f"0+{100 - share}x4400",
        'lowbit_requests_total{model="chat", status="500"}': f"0+{share}x4400",
    }


_BURN_LOOK = ("lowbit doctor URL", "the log of `lowbit serve --log`: which tier, which status")
_BURN_MEND = (
    "a tier that fails: `lowbit doctor URL` names it; put another tier of the model below it in serve.yaml, so that "
    "requests fall back",
    "too much load (503, 504): raise `concurrency` of the tier, add a replica, or lower `limits.queue_requests`",
)

SERVICE: tuple[Alert, ...] = (
    Alert(
        "LowbitDown",
        "critical",
        'up{job="lowbit"} == 0',
        "2m",
        "the gateway at {{ $labels.instance }} does not answer",
        PLAIN,
        "Nobody gets an answer from this gateway. Its process ended, or the machine or network did.",
        ("systemctl status lowbit, docker ps or kubectl get pods", "lowbit doctor URL"),
        ("start it: systemctl restart lowbit, docker compose up -d or kubectl rollout restart deployment/lowbit",),
        Case({f"up{{{HERE}}}": "0x10"}, 5, AT, "0", {f"up{{{HERE}}}": "1x10"}),
    ),
    Alert(
        "LowbitNoTierReady",
        "critical",
        'count by (job, instance, model) (lowbit_tier_state{state!="cold"}) unless'
        ' count by (job, instance, model) (lowbit_tier_state{state="ready"})',
        "10m",
        "no tier of {{ $labels.model }} is ready",
        PLAIN,
        "Requests for this model are refused with 503: each of its tiers is loading, failed, or being unloaded.",
        ("lowbit doctor URL", "the engines' logs, in the directory that `logs:` of serve.yaml names"),
        (
            "a checkpoint that does not load: lowbit verify PATH; lowbit restore DEST OUT, or quantize again",
            "too little memory: lowbit estimate PATH; fewer bits, less context or concurrency",
        ),
        Case(
            {f'lowbit_tier_state{{{HERE}, {TIER}, state="loading"}}': "1x20"},
            15,
            {**AT, "model": "chat"},
            "1",
            {f'lowbit_tier_state{{{HERE}, {TIER}, state="ready"}}': "1x20"},
        ),
    ),
    Alert(
        "LowbitErrorBudgetBurnFast",
        "critical",
        _burn("14.4", "1h", "5m"),
        "2m",
        "{{ $labels.model }} fails so often that a month's error budget is gone in two days",
        PERCENT,
        "Many requests end with a 5xx status. Two windows must agree, so it neither fires for a moment's trouble nor "
        "goes on long after it.",
        _BURN_LOOK,
        _BURN_MEND,
        Case(_failing(5), 80, {"model": "chat"}, "5%", _failing(1)),
    ),
    Alert(
        "LowbitErrorBudgetBurn",
        "critical",
        _burn("6", "6h", "30m"),
        "15m",
        "{{ $labels.model }} fails so often that a month's error budget is gone in five days",
        PERCENT,
        "A steady share of requests ends with a 5xx status.",
        _BURN_LOOK,
        _BURN_MEND,
        Case(
            _failing(1), 500, {"model": "chat"}, "1%", {'lowbit_requests_total{model="chat", status="200"}': "0+9x600"}
        ),
    ),
    Alert(
        "LowbitErrorBudgetBurnSlow",
        "warning",
        _burn("1", "3d", "6h"),
        "1h",
        "{{ $labels.model }} fails more often than its objective allows",
        PERCENT,
        "A few requests end with a 5xx status, all the time. Nobody need get up for it, but the "
        "objective will be missed.",
        _BURN_LOOK,
        _BURN_MEND,
        Case(_failing(1), 4380, {"model": "chat"}, "1%"),
    ),
    Alert(
        "LowbitQueueFilling",
        "warning",
        "lowbit_queue_requests / on (job, instance) group_left () lowbit_queue_limit_requests > $queue_share",
        "2m",
        "the queue of {{ $labels.model }} is nearly full",
        PERCENT,
        "More requests arrive than are answered. When the queue is full, the gateway refuses with 503 and Retry-After.",
        ("lowbit bench URL --rates …: what does this machine manage?", "GET /status: which tier answers"),
        (
            "lowbit tune CONFIG.yaml, or more `concurrency` where memory allows",
            "another replica (lowbit deploy kubernetes scales on this metric)",
            "a tier of fewer bits for when load is high: policy.ttft makes the gateway step down by itself",
        ),
        Case(
            {
                f'lowbit_queue_requests{{{HERE}, model="chat"}}': "250x10",
                f"lowbit_queue_limit_requests{{{HERE}}}": "256x10",
            },
            5,
            {**AT, "model": "chat"},
            "97.66%",
            {
                f'lowbit_queue_requests{{{HERE}, model="chat"}}': "10x10",
                f"lowbit_queue_limit_requests{{{HERE}}}": "256x10",
            },
        ),
    ),
    Alert(
        "LowbitQueueSlow",
        "warning",
        "lowbit:queue_seconds:p95_10m > $queue_seconds",
        "10m",
        "requests for {{ $labels.model }} wait long for their turn",
        SECONDS,
        "One request in twenty waits longer than people do.",
        ("lowbit doctor URL", "is one key taking all? limits.key_concurrency"),
        ("as for LowbitQueueFilling", "limits.key_requests_per_minute and limits.key_concurrency for greedy clients"),
        Case(
            {
                'lowbit_queue_seconds_bucket{model="chat", le="10"}': "0x40",
                'lowbit_queue_seconds_bucket{model="chat", le="30"}': "0+10x40",
                'lowbit_queue_seconds_bucket{model="chat", le="+Inf"}': "0+10x40",
            },
            30,
            {"model": "chat"},
            "29s",
            {
                'lowbit_queue_seconds_bucket{model="chat", le="1"}': "0+10x40",
                'lowbit_queue_seconds_bucket{model="chat", le="30"}': "0+10x40",
                'lowbit_queue_seconds_bucket{model="chat", le="+Inf"}': "0+10x40",
            },
        ),
    ),
    Alert(
        "LowbitFirstTokenSlow",
        "warning",
        "lowbit:time_to_first_token_seconds:p95_10m > $first_token_seconds",
        "10m",
        "{{ $labels.model }}@{{ $labels.tier }} takes long to begin its answers",
        SECONDS,
        "One request in twenty waits longer for its first token than the objective allows.",
        ("lowbit doctor URL", "are prompts longer than before? rate of lowbit_tokens_total by kind"),
        ("lowbit tune CONFIG.yaml; flags.prefix_caching: true where prompts begin alike", "as for LowbitQueueFilling"),
        Case(
            {
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="5"}}': "0x40",
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="10"}}': "0+10x40",
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="+Inf"}}': "0+10x40",
            },
            30,
            SEEN,
            "9.75s",
            {
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="1"}}': "0+10x40",
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="10"}}': "0+10x40",
                f'lowbit_time_to_first_token_seconds_bucket{{{TIER}, le="+Inf"}}': "0+10x40",
            },
        ),
    ),
    Alert(
        "LowbitDegraded",
        "warning",
        "lowbit_level > 0",
        "30m",
        "{{ $labels.model }} has answered with a lower tier for half an hour",
        "{{ $value | humanize }} steps down",
        "Objectives were missed or a tier was lost, and the load or the loss has not gone away.",
        ("lowbit doctor URL", "GET /status"),
        ("as for LowbitQueueFilling", "a lost tier: as for LowbitNoTierReady"),
        Case(
            {'lowbit_level{model="chat"}': "1x50"},
            40,
            {"model": "chat"},
            "1 steps down",
            {'lowbit_level{model="chat"}': "0x50"},
        ),
    ),
)
