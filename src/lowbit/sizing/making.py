"""What ``lowbit quantize`` itself will take, before it runs."""

from __future__ import annotations

import math
from dataclasses import replace

from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.checks import MARGIN
from lowbit.planning import Hardware, Workload, predict
from lowbit.planning.cost import Prediction
from lowbit.sizing.headers import HeaderModel
from lowbit.sizing.variant import Variant


def predict_making(
    model: HeaderModel,
    variant: Variant,
    hardware: Hardware,
    *,
    method: str = "gptq",
    samples: int = 128,
    seq_len: int = 2048,
    memory: int | None = None,
    gemm_flops: float = 1e11,
) -> Prediction:
    """Cost of quantizing ``model`` to ``variant``, decided as the pipeline does with ``memory`` bytes allowed."""
    shape = model.description
    modules = [replace(m, method=method) if m.spec is not None else m for m in variant.modules]
    outside = {name: header for name, header in model.dense.items() if not name.startswith(f"{model.blocks}.")}
    shell = sum(4 * math.prod(extents) for _, extents in outside.values() if len(extents) == 1)
    seq_len = min(seq_len, shape.max_positions or seq_len)
    workload = Workload(
        samples=samples,
        seq_len=seq_len,
        hidden=shape.hidden,
        heads=shape.heads,
        head_dim=shape.head_dim,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        shell_bytes=shell,
        cpus=hardware.cpus,
    )
    groups = fused_groups([module.name for module in modules])
    prediction = predict(modules, groups, workload, gemm_flops)
    allowed = memory or hardware.available // 2
    if prediction.peak_bytes * MARGIN > allowed:
        prediction = predict(modules, groups, replace(workload, keep_states=False), gemm_flops)
    return prediction
