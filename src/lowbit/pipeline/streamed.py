"""A transformers model of which only one block is in memory at a time.

transformers builds the model on the meta device. The blocks are replaced by taps: one forward of the empty shell
then yields what each block is called with (masks, position embeddings), the embedding, or the logits of given final
hidden states, whatever the family does in between. Blocks are materialised from the checkpoint one by one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import StoredGrid, StoredModule, module_plan, read_dense, read_dense_rows
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.pipeline.architectures import Family, family_of
from lowbit.pipeline.experts import unfuse_experts
from lowbit.pipeline.inputs import RoundingLinear, prepare_linears, stored_input_scale
from lowbit.pipeline.kv_scales import KvScales

HEAD_ROWS = 16384
"""Vocabulary rows of an output head that are held in compute precision at a time."""


class _EmbeddedError(Exception):
    """Ends the shell's forward once the first block's input is known; never leaves this module."""


class _Tap(nn.Module):
    """Stands in a block's place and lets the shell run without it."""

    def __init__(self, index: int, owner: StreamedModel, original: nn.Module) -> None:
        super().__init__()
        self._index = index
        self._owner = [owner]  # in a list: not a submodule
        self._original = [original]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._owner[0]._tapped(self._index, hidden_states, args, kwargs)


class _Embedding(nn.Module):
    """Looks rows up in the checkpoint, so that a large table is never read whole."""

    def __init__(self, original: nn.Embedding, owner: StreamedModel, name: str) -> None:
        super().__init__()
        self._original = original
        self._original.padding_idx = None  # matters for gradients only, and would be checked against the rows read
        self._owner = [owner]
        self._name = name
        self.instead: tuple[torch.Tensor, torch.Tensor] | None = None
        """Ascending ids and their rows, taken instead of the checkpoint's."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        owner = self._owner[0]
        rows, inverse = torch.unique(ids, return_inverse=True)
        if self.instead is None:
            table = read_dense_rows(owner.checkpoint, owner.plan, self._name, rows.cpu())
        else:
            table = self.instead[1][torch.searchsorted(self.instead[0], rows.cpu())]
        self._original._parameters["weight"] = nn.Parameter(table.to(owner.device, owner.dtype), requires_grad=False)
        return self._original(inverse, *args, **kwargs)  # type: ignore[no-any-return]


class _Head(nn.Module):
    """The output head in its stored precision, read when first used, computed a slice of the vocabulary at a time."""

    def __init__(self, owner: StreamedModel, weight: str, bias: str | None) -> None:
        super().__init__()
        self._owner = [owner]
        self._names = (weight, bias)
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self.instead: torch.Tensor | None = None
        """Weights ``[vocabulary, hidden]`` taken instead of the checkpoint's."""

    def _load(self) -> torch.Tensor:
        if self._weight is None:
            owner = self._owner[0]
            weight = read_dense(owner.checkpoint, owner.plan, self._names[0])
            small = weight.numel() <= HEAD_ROWS * 1024
            self._weight = weight.to(owner.device, owner.dtype if small else weight.dtype)
            if self._names[1] is not None:
                self._bias = read_dense(owner.checkpoint, owner.plan, self._names[1]).to(owner.device, owner.dtype)
        return self._weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, dtype = self._load(), hidden.dtype
        weight = weight if self.instead is None else self.instead
        rows = weight.shape[0]
        logits = torch.empty(*hidden.shape[:-1], rows, dtype=dtype, device=hidden.device)
        for first in range(0, rows, HEAD_ROWS):
            last = min(first + HEAD_ROWS, rows)
            bias = None if self._bias is None else self._bias[first:last]
            logits[..., first:last] = nn.functional.linear(hidden, weight[first:last].to(dtype), bias)
        return logits


class StreamedModel:
    """A causal language model over a checkpoint in any format that lowbit reads, quantized weights dequantized.

    Inputs that an engine would quantize are rounded as it does (:mod:`lowbit.pipeline.inputs`).

    Raises :class:`UnsupportedError` for an architecture that transformers does not know or that has no single list of
    blocks, and :class:`CheckpointError` for a tensor that the model needs and the checkpoint lacks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype
        self.plan: dict[str, StoredModule] = module_plan(checkpoint)
        self.model = build_empty(checkpoint, trust_remote_code=trust_remote_code)
        self.config = self.model.config.get_text_config()
        self.family: Family = family_of(self.config.model_type)
        self.hidden_size: int = self.config.hidden_size
        self._renames = [
            (old, new) for old, new in self.family.renames if any(new in name for name in checkpoint.tensors)
        ]
        self._blocks_path, self._blocks = _find_blocks(self.model)
        for block in self._blocks:
            unfuse_experts(block, self.family.experts)
            prepare_linears(block)
        self.block_names = [f"{self._blocks_path}.{i}" for i in range(len(self._blocks))]
        self._head_name: str | None = None
        self._contexts: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._mode = ""
        self._captured: Any = None
        self._taps = nn.ModuleList([_Tap(i, self, block) for i, block in enumerate(self._blocks)])
        self._install(self._taps)
        self._prepare_shell()
        self.model.eval()

    # ---- names -----------------------------------------------------------------------------------------------

    def stored_name(self, name: str) -> str:
        """The checkpoint's name for the model's parameter or module ``name``."""
        for old, new in self._renames:
            name = name.replace(old, new)
        return name[len(self._extra_prefix) :] if name.startswith(self._extra_prefix) else self._missing_prefix + name

    def _match_prefix(self) -> None:
        """Find out whether the checkpoint's names carry the base model's prefix."""
        self._extra_prefix, self._missing_prefix = "", ""
        base = f"{self.model.base_model_prefix}."
        embedding = self._embedding_name + ".weight"
        if embedding in self.checkpoint.tensors:
            return
        if embedding.startswith(base) and embedding[len(base) :] in self.checkpoint.tensors:
            self._extra_prefix = base
        elif any(name.endswith(f".{embedding}") for name in self.checkpoint.tensors):
            found = next(name for name in self.checkpoint.tensors if name.endswith(f".{embedding}"))
            self._missing_prefix = found[: -len(embedding)]
        else:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {embedding} is missing: is the download complete?")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Stored name to ``(out_features, in_features)`` of every linear inside the blocks."""
        return {
            self.stored_name(f"{prefix}.{name}"): (module.out_features, module.in_features)
            for prefix, block in zip(self.block_names, self._blocks, strict=True)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }

    def head_names(self) -> list[str]:
        """Stored name of the output head, whether or not it is tied to the embedding."""
        return (
            [] if self._head_name is None else [self.stored_name(f"{self._head_name}.weight").removesuffix(".weight")]
        )

    def shell_bytes(self) -> int:
        """Memory that norms, position tables and the like outside the blocks take."""
        return sum(p.numel() * p.itemsize for p in self.model.parameters() if p.device.type != "meta")

    def shell_names(self) -> list[str]:
        """Stored names of the tensors outside the blocks, those that the model ignores among them."""
        prefixes = tuple(f"{self.stored_name(name)}." for name in self.block_names)
        return [name for name in self.checkpoint.tensors if not name.startswith(prefixes)]

    def block_tensor_names(self, index: int) -> list[str]:
        """Stored names of all tensors of block ``index``."""
        prefix = f"{self.stored_name(self.block_names[index])}."
        return [name for name in self.checkpoint.tensors if name.startswith(prefix)]

    # ---- building --------------------------------------------------------------------------------------------

    def _prepare_shell(self) -> None:
        embedding = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        self._embedding_name = names[embedding]
        self._match_prefix()
        for module in self.model.modules():
            self._restore_buffers(module)
        if head is not None:
            self._head_name = names[head]
            weight, bias = self.stored_name(f"{self._head_name}.weight"), self.stored_name(f"{self._head_name}.bias")
            if not self._has(weight):
                if not self.config.tie_word_embeddings:
                    raise CheckpointError(f"{self.checkpoint.path}: tensor {weight} is missing and not tied")
                weight = self.stored_name(f"{self._embedding_name}.weight")
            has_bias = getattr(head, "bias", None) is not None
            self._replace(self._head_name, _Head(self, weight, bias if has_bias else None))
        stored = self.stored_name(f"{self._embedding_name}.weight")
        self._replace(self._embedding_name, _Embedding(embedding, self, stored))
        skip = {id(p) for p in embedding.parameters()}
        for name, parameter in list(self.model.named_parameters()):
            if id(parameter) not in skip and parameter.device.type == "meta":
                self._set(self.model, name, self._dense(name))

    def _install(self, blocks: nn.ModuleList) -> None:
        parent, _, last = self._blocks_path.rpartition(".")
        setattr(self.model.get_submodule(parent), last, blocks)

    @contextmanager
    def with_blocks(self, blocks: Sequence[nn.Module]) -> Iterator[Any]:
        """The whole transformers model over loaded ``blocks``, for as long as the context lasts."""
        self._install(nn.ModuleList(blocks))
        try:
            yield self.model
        finally:
            self._install(self._taps)

    @contextmanager
    def with_head(self, weight: torch.Tensor) -> Iterator[None]:
        """While it lasts, :meth:`logits` come from a head of these weights ``[vocabulary, hidden]``."""
        assert self._head_name is not None  # a causal language model has one
        head = self.model.get_submodule(self._head_name)
        head.instead = weight.to(self.device)
        try:
            yield
        finally:
            head.instead = None

    @contextmanager
    def with_embedding(self, ids: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
        """While it lasts, :meth:`embed` takes tokens' ``rows`` ``[n, hidden]``, of ascending ``ids`` ``[n]``, only."""
        embedding = self.model.get_submodule(self._embedding_name)
        embedding.instead = (ids, rows)
        try:
            yield
        finally:
            embedding.instead = None

    def _has(self, weight: str) -> bool:
        """Whether the checkpoint holds the weight, dense or quantized."""
        return weight in self.checkpoint.tensors or weight.removesuffix(".weight") in self.plan

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        self.model.get_submodule(parent).add_module(last, module)

    def _restore_buffers(self, module: nn.Module) -> None:
        """Recompute what a module built on the meta device derives from the config (rotary frequencies, scales)."""
        if not any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            return
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty_like(buffer, device=self.device)
        self.model._init_weights(module)

    def _dense(self, name: str) -> torch.Tensor:
        stored = self.stored_name(name)
        try:
            tensor = read_dense(self.checkpoint, self.plan, stored)
        except KeyError:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {stored} is missing: is the download complete?"
            ) from None
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.checkpoint.path}: tensor {stored} has values that are not finite")
        return tensor.to(self.device, self.dtype)

    def _set(self, root: nn.Module, name: str, tensor: torch.Tensor) -> None:
        parent, _, last = name.rpartition(".")
        module = root.get_submodule(parent)
        expected = module._parameters[last]
        if expected is not None and tuple(expected.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor for {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(expected.shape)}"
            )
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)

    def load_block(self, index: int) -> nn.Module:
        """Block ``index`` with dense weights in the compute dtype, inputs rounded where the checkpoint says so.

        It is the caller's, and gone when released.
        """
        block = copy.deepcopy(self._blocks[index])
        prefix = self.block_names[index]
        for module in block.modules():
            self._restore_buffers(module)
        for name, _ in list(block.named_parameters()):
            self._set(block, name, self._dense(f"{prefix}.{name}"))
        for name, module in block.named_modules():
            if f"{self.stored_name(f'{prefix}.{name}')}.k_scale" in self.checkpoint.tensors:
                module.cache_scales = KvScales.read(self.checkpoint, self.stored_name(f"{prefix}.{name}"))
            entry = self.plan.get(self.stored_name(f"{prefix}.{name}"))
            if isinstance(module, RoundingLinear) and isinstance(entry, StoredGrid) and entry.inputs is not None:
                scale = stored_input_scale(self.checkpoint, self.stored_name(f"{prefix}.{name}"), entry)
                module.round_inputs(entry.inputs, None if scale is None else scale.to(self.device))
        return block.eval()

    def empty_block(self, index: int) -> nn.Module:
        """Block ``index`` on the meta device: shapes only."""
        return self._blocks[index]

    # ---- running ---------------------------------------------------------------------------------------------

    def _tapped(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if self._mode == "embed":
            self._captured = hidden
            raise _EmbeddedError
        if self._mode == "context":
            if args:
                raise UnsupportedError(f"{self.config.model_type}: blocks are called with positional arguments")
            self._captured.append(kwargs)
            return hidden
        return self._captured if index == 0 else hidden

    @contextmanager
    def _running(self, mode: str, value: Any) -> Iterator[None]:
        self._mode, self._captured = mode, value
        try:
            yield
        finally:
            self._mode, self._captured = "", None

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The first block's input ``[batch, length, hidden]`` for token ids ``[batch, length]``."""
        with self._running("embed", None):
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except _EmbeddedError:
                return self._captured  # type: ignore[no-any-return]
        raise UnsupportedError(f"{self.config.model_type}: the model never calls its blocks")

    @torch.no_grad()
    def context(self, index: int, batch: int, length: int) -> dict[str, Any]:
        """The keyword arguments (masks, position embeddings …) of block ``index`` for full windows of that shape."""
        key = (batch, length)
        if key not in self._contexts:
            calls: list[dict[str, Any]] = []
            with self._running("context", calls):
                self.model(input_ids=torch.zeros(batch, length, dtype=torch.long, device=self.device), use_cache=False)
            self._contexts[key] = calls
        return self._contexts[key][index]

    def run_block(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output of ``block`` (loaded as ``index``) for hidden states ``[batch, length, hidden]``.

        Differentiable: a graph is kept where ``hidden`` asks for gradients, and only there.
        """
        hidden = hidden.to(self.device, self.dtype)
        return apply_block(block, hidden, self.context(index, hidden.shape[0], hidden.shape[1]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of the last block's output, final norm and head applied.

        Differentiable: a graph is kept where ``hidden`` asks for gradients, and only there.
        """
        hidden = hidden.to(self.device, self.dtype)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with self._running("logits", hidden):
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def apply_block(block: nn.Module, hidden: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """The output of ``block``, called with ``hidden`` and the arguments of :meth:`StreamedModel.context`."""
    output = block(hidden, **context)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the model's dense weights are stored in: config.json's word, else that of most tensors."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    counts = Counter(info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.float32


def build_empty(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a checkpoint's config, on the meta device, without quantization hooks.

    Raises :class:`UnsupportedError` when transformers does not know the architecture.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "compression_config")}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise CheckpointError(f"{checkpoint.path}/config.json: model_type is missing")
    try:
        if trust_remote_code and "auto_map" in values:
            config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)
        else:
            config = AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        if "auto_map" in values:
            hint = "it brings its own code: read it, then pass --trust-remote-code"
        else:
            hint = "upgrade transformers, or check model_type in config.json"
        raise UnsupportedError(f"{checkpoint.path}: unknown architecture {model_type!r}", [hint]) from error
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: {' '.join(str(error).split())[:300]}") from error
    config = config.get_text_config()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    except ValueError as error:
        raise UnsupportedError(f"{checkpoint.path}: {model_type!r} is no causal language model") from error


def _find_blocks(model: Any) -> tuple[str, list[nn.Module]]:
    """Path and modules of the decoder's list of blocks."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise UnsupportedError(
            f"{model.config.model_type}: no single list of {count} blocks", [f"found {[n for n, _ in outer]}"]
        )
    name, blocks = outer[0]
    return name, list(blocks)
