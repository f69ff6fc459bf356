"""Recipes: what is to be quantized how. Strict: a key that means nothing is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from lowbit.errors import UsageError
from lowbit.formats import Scheme, WeightSpec, parse_scheme
from lowbit.quant.transforms import TRANSFORMS

_T = TypeVar("_T")

_ORDERINGS = ("none", "static")


@dataclass(frozen=True, slots=True)
class Rule:
    """What is different for the modules whose full name matches ``pattern`` from its start (``re.match``).

    ``skip`` leaves them dense; a field that is None keeps the recipe's own value.
    """

    pattern: str
    skip: bool = False
    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    method: str | None = None
    ordering: str | None = None
    transform: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"rule {self.pattern!r}: not a regular expression ({error})") from error
        if self.ordering is not None and self.ordering not in _ORDERINGS:
            raise UsageError(f"rule {self.pattern!r}: ordering must be none or static, not {self.ordering!r}")

    def matches(self, name: str) -> bool:
        """Whether this rule is about the module ``name``."""
        return re.match(self.pattern, name) is not None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe. ``scheme`` is a preset or number format; ``bits``, ``group_size``, ``symmetric`` override it.

    ``transform`` rewrites weights before they are solved (None: the method's own, if it has one), ``rotate`` the whole
    model before that (:mod:`lowbit.pipeline.rotate`). ``sparsity`` is the pattern of zeros (``2:4``, ``50%``) that
    ``pruner`` makes; ``all_experts`` calibrates each expert on all tokens; ``kv_cache`` (``fp8``, ``fp8-head``) asks
    for calibrated scales of the key-value cache; ``budget`` (``30m``) is the time of methods with candidates.
    ``options`` are those of the method, ``transform_options`` those of transforms by their names
    (:func:`method_options`). Of ``rules`` the first that matches a module wins.
    """

    scheme: str = "W4A16"
    method: str = "gptq"
    format: str = "compressed-tensors"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    ordering: str | None = None
    transform: str | None = None
    rotate: str | None = None
    sparsity: str | None = None
    pruner: str | None = None
    all_experts: bool = False
    kv_cache: str | None = None
    budget: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    transform_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.ordering is not None and self.ordering not in _ORDERINGS:
            raise UsageError(f"recipe: ordering must be none or static, not {self.ordering!r}")
        for name in self.transform_options:
            if name not in TRANSFORMS:
                raise UsageError(f"recipe: transform_options: unknown transform {name!r}{suggestion(name, TRANSFORMS)}")
            self.options_of_transform(name)

    def options_of_transform(self, name: str, method: Any = None) -> Any:
        """The options of the transform ``name``: its own here, else ``method``, a method's options, if they are its."""
        kind = TRANSFORMS[name].options
        if name not in self.transform_options and isinstance(method, kind):
            return method
        given = self.transform_options.get(name, {})
        return method_options(kind, given, where=f"recipe: transform_options: {name}")

    @property
    def quantization(self) -> Scheme:
        """The formats of weights and inputs of the modules that no rule speaks of."""
        return parse_scheme(self.scheme).changed(self.bits, self.group_size, self.symmetric)

    @property
    def spec(self) -> WeightSpec:
        """The number format of the weights of modules that no rule speaks of."""
        return self.quantization.weights

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises :class:`UsageError` naming the file and the key."""
        file = Path(path)
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except OSError as error:
            raise UsageError(f"recipe {file}: cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"recipe {file}: not UTF-8 text") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise UsageError(f"recipe {file}{where}: not valid YAML ({problem})") from error
        return cls.from_dict({} if content is None else content, where=f"recipe {file}")

    @classmethod
    def from_dict(cls, content: Any, *, where: str = "recipe") -> Recipe:
        """A recipe from plain values; ``where`` leads the messages of errors.

        Keys: scheme, method, format, bits, group_size, sym, ordering (or desc_act), transform, rotate, sparsity,
        pruner, all_experts, kv_cache, budget, options, transform_options, skip, rules, dynamic.
        """
        values = _table(content, _RECIPE_KEYS, where)
        rules = [Rule(_string(pattern, f"{where}: skip"), skip=True) for pattern in _list(values, "skip", where)]
        for index, item in enumerate(_list(values, "rules", where)):
            rules.append(_rule(item, f"{where}: rules[{index}]"))
        rules += rules_from_dynamic(values.get("dynamic") or {}, where=f"{where}: dynamic")
        options = _names(values.get("options") or {}, f"{where}: options")
        transforms = _names(values.get("transform_options") or {}, f"{where}: transform_options")
        tables = {name: _names(table, f"{where}: transform_options: {name}") for name, table in transforms.items()}
        fields = _overrides(values, where)
        for name in _NAMED:
            if name in values:
                fields[name] = _string(values[name], f"{where}: {name}")
        fields["all_experts"] = _boolean(values.get("all_experts", False), f"{where}: all_experts")
        return cls(options=options, transform_options=tables, rules=tuple(rules), **fields)

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """The same recipe with ``rules`` before its own, as flags of the command line go before the file."""
        return replace(self, rules=(*rules, *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; :meth:`from_dict` reads them back."""
        plain: dict[str, Any] = {"scheme": self.scheme, "method": self.method, "format": self.format}
        plain.update(_plain_overrides(self))
        plain.update({name: getattr(self, name) for name in _NAMED if getattr(self, name) is not None})
        plain.update({"all_experts": True} if self.all_experts else {})
        if self.options:
            plain["options"] = dict(sorted(self.options.items()))
        if self.transform_options:
            plain["transform_options"] = {n: dict(sorted(t.items())) for n, t in sorted(self.transform_options.items())}
        if self.rules:
            plain["rules"] = [
                {"pattern": rule.pattern, **({"skip": True} if rule.skip else _plain_overrides(rule))}
                for rule in self.rules
            ]
        return plain


def rules_from_dynamic(dynamic: Any, *, where: str = "dynamic") -> list[Rule]:
    """Rules from GPTQModel's ``dynamic`` table: ``-:regex`` skips, ``+:regex`` or ``regex`` overrides, in given order.

    Overrides: bits, group_size, sym, method, ordering, desc_act (only false: act order goes by ``ordering: static``).
    """
    if not isinstance(dynamic, Mapping):
        raise UsageError(f"{where}: expected a table of patterns, e.g. '+:.*down_proj': {{bits: 8}}")
    rules = []
    for key, value in dynamic.items():
        text = _string(key, where)
        inside = f"{where}: {text!r}"
        if text.startswith("-:"):
            if value not in ({}, None, False):
                raise UsageError(f"{inside}: a skip rule takes no settings: write it with an empty table {{}}")
            rules.append(Rule(text[2:], skip=True))
            continue
        rules.append(Rule(text.removeprefix("+:"), **_overrides(_table(value or {}, _OVERRIDE_KEYS, inside), inside)))
    return rules


def method_options(kind: type[_T], options: Mapping[str, Any], *, where: str = "recipe: options") -> _T:
    """An options dataclass ``kind`` filled from a recipe's ``options``.

    Raises :class:`UsageError` for an unknown name, with a suggestion, and for a value of another type.
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind} is not a dataclass")
    types = get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind) if item.init]
    for name, value in options.items():
        if name not in names:
            raise UsageError(f"{where}: unknown option {name!r}{suggestion(name, names)}")
        if (expected := _EXPECTED.get(types[name])) and type(value) not in expected:
            raise UsageError(f"{where}: {name}: expected {_TYPE_NAMES[types[name]]}, not {value!r}")
    return kind(**options)


_EXPECTED: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}
_TYPE_NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def suggestion(name: str, known: Collection[str]) -> str:
    """``: did you mean 'x'?`` for the nearest of ``known``, else ``: use a, b or c``."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(sorted(known))}"


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The table of ``node``. Raises :class:`yaml.YAMLError` for a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_OVERRIDE_KEYS = ("scheme", "bits", "group_size", "sym", "symmetric", "method", "ordering", "desc_act")
_NAMED = ("format", "transform", "rotate", "sparsity", "pruner", "kv_cache", "budget")
_RECIPE_KEYS = (
    *(*_OVERRIDE_KEYS, *_NAMED, "all_experts", "options", "transform_options"),
    *("skip", "rules", "dynamic"),
)
_RULE_KEYS = (*_OVERRIDE_KEYS, "transform", "pattern", "skip")


def _table(value: Any, keys: Collection[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected a table of {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise UsageError(f"{where}: unknown key {key!r}{suggestion(str(key), keys)}")
    return value


def _names(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{where} must be a table of names and values")
    return dict(value)


def _rule(item: Any, where: str) -> Rule:
    values = _table(item, _RULE_KEYS, where)
    if "pattern" not in values:
        raise UsageError(f"{where}: needs a pattern, a regular expression for full module names")
    pattern = _string(values["pattern"], f"{where}: pattern")
    overrides = _overrides(values, where)
    if values.get("transform") is not None:
        overrides["transform"] = _string(values["transform"], f"{where}: transform")
    skip = _boolean(values.get("skip", False), f"{where}: skip")
    if skip and overrides:
        raise UsageError(f"{where}: skip leaves the modules dense, so {next(iter(overrides))!r} has no meaning")
    return Rule(pattern, skip=skip, **overrides)


def _overrides(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that a recipe and a rule share, checked and under their own names."""
    fields: dict[str, Any] = {}
    for name in ("bits", "group_size"):
        if values.get(name) is not None:
            fields[name] = _integer(values[name], f"{where}: {name}")
    for name in ("sym", "symmetric"):
        if values.get(name) is not None:
            fields["symmetric"] = _boolean(values[name], f"{where}: {name}")
    for name in ("scheme", "method", "ordering"):
        if values.get(name) is not None:
            fields[name] = _string(values[name], f"{where}: {name}")
    if values.get("desc_act") is not None:
        if _boolean(values["desc_act"], f"{where}: desc_act"):
            raise UsageError(
                f"{where}: desc_act: true makes files that vLLM refuses: use ordering: static, "
                "which orders the same way while solving and stores no g_idx"
            )
        fields.setdefault("ordering", "none")
    return fields


def _plain_overrides(values: Recipe | Rule) -> dict[str, Any]:
    named = (
        ("bits", values.bits),
        ("group_size", values.group_size),
        ("sym", values.symmetric),
        ("ordering", values.ordering),
    )
    plain: dict[str, Any] = {name: value for name, value in named if value is not None}
    if isinstance(values, Rule):
        names = ("scheme", "method", "transform")
        plain |= {key: getattr(values, key) for key in names if getattr(values, key) is not None}
    return plain


def _list(values: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{where}: {key} must be a list")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: expected text, not {value!r}")
    return value


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{where}: expected a whole number, not {value!r}")
    return value


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where}: expected true or false, not {value!r}")
    return value
