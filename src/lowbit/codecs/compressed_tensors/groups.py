"""The groups of a compressed-tensors config, and which of them a module belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowbit.codecs.compressed_tensors.arguments import preset
from lowbit.errors import CheckpointError

__all__ = ["Groups", "target"]


class Groups:
    """A config's groups, by target."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._exact: dict[str, Mapping[str, Any]] = {}
        self._regexes: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        self._classes: list[Mapping[str, Any]] = []
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config: config_groups is missing or empty")
        for name, group in groups.items():
            scheme = preset(name, group) if isinstance(group, list) else group
            if not isinstance(scheme, Mapping) or not isinstance(scheme.get("targets"), list):
                raise CheckpointError(f"quantization_config: config_groups.{name} has no list of targets")
            scheme = {"format": config.get("format"), **{k: v for k, v in scheme.items() if v is not None}}
            for wanted in scheme["targets"]:
                self._add(str(wanted), scheme)

    def _add(self, wanted: str, scheme: Mapping[str, Any]) -> None:
        if wanted.startswith("re:"):
            try:
                self._regexes.append((re.compile(wanted[3:]), scheme))
            except re.error as error:
                raise CheckpointError(f"quantization_config: target {wanted!r} is no regular expression") from error
        elif "." in wanted:
            self._exact[wanted] = scheme
        else:
            self._exact[wanted] = scheme
            self._classes.append(scheme)

    def of(self, module: str) -> Mapping[str, Any]:
        """The scheme of ``module``: by exact name, else by regex, else the one group that targets a class."""
        if module in self._exact:
            return self._exact[module]
        for pattern, scheme in self._regexes:
            if pattern.match(module):
                return scheme
        if self._classes:
            return self._classes[0]
        raise CheckpointError(f"{module}: quantized tensors, but no group of quantization_config targets it")


def target(pattern: str) -> str:
    """A target for ``^…$``: the plain name where the pattern stands for one."""
    plain = re.sub(r"\\(.)", r"\1", pattern[1:-1])
    return plain if f"^{re.escape(plain)}$" == pattern else f"re:{pattern}"
