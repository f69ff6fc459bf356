"""Planning: hardware, cost, tensor parallelism, engine rules, and the preflight that uses them all."""

from lowbit.devices.gpu import Gpu
from lowbit.planning.cost import Prediction, Workload, predict
from lowbit.planning.hardware import Hardware, NumaNode, free_disk, measure_gemm, peak_memory, probe, reset_peak_memory
from lowbit.planning.modules import PlannedModule
from lowbit.planning.parallel import ParallelPlan, tensor_parallel
from lowbit.planning.preflight import Report, Situation, planned, preflight, round_trip
from lowbit.planning.targets import Finding, Target, parse_target

__all__ = [
    "Finding",
    "Gpu",
    "Hardware",
    "NumaNode",
    "ParallelPlan",
    "PlannedModule",
    "Prediction",
    "Report",
    "Situation",
    "Target",
    "Workload",
    "free_disk",
    "measure_gemm",
    "parse_target",
    "peak_memory",
    "planned",
    "predict",
    "preflight",
    "probe",
    "reset_peak_memory",
    "round_trip",
    "tensor_parallel",
]
