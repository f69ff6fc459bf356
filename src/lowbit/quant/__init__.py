"""Quantization algorithms: statistics of inputs, transforms, solvers, error measures."""

from lowbit.quant.allocation import Option, allocate
from lowbit.quant.autoround import AutoRoundOptions
from lowbit.quant.awq import AwqOptions, AwqScaling, search_scales
from lowbit.quant.best import BestOptions, Pace
from lowbit.quant.error import WeightError, output_error, weight_error
from lowbit.quant.gptaq import GptaqOptions
from lowbit.quant.gptq import Factor, GptqOptions, factorise
from lowbit.quant.gptq import solve as solve_gptq
from lowbit.quant.hqq import HqqOptions
from lowbit.quant.methods import METHODS, Method, Options
from lowbit.quant.paired import PairedStatistics
from lowbit.quant.rtn import RtnOptions, round_to_nearest
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = [
    "METHODS",
    "AutoRoundOptions",
    "AwqOptions",
    "AwqScaling",
    "BestOptions",
    "Factor",
    "GptaqOptions",
    "GptqOptions",
    "HqqOptions",
    "InputStatistics",
    "Method",
    "Option",
    "Options",
    "Pace",
    "PairedStatistics",
    "RtnOptions",
    "Solution",
    "WeightError",
    "allocate",
    "factorise",
    "output_error",
    "round_to_nearest",
    "search_scales",
    "solve_gptq",
    "weight_error",
]
