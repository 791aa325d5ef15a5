"""Quantised safetensors: GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes under plain names.

A quantised linear X of a file is several tensors (X.qweight, X.scales, ...). `QuantisedCheckpoint` shows them as one
matrix X.weight of shape [out, in], a PackedTensor in a format of `blocks` that is made when its data is asked for. So
families, adapters and runners know nothing of layouts. Which linears are quantised is told by the file's tensors;
`modules_to_not_convert`, `ignore` and the like say which are not, and are only checked.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from martlet.errors import CheckpointError
from martlet.hub.checkpoint import Checkpoint, Tensor, has

Config = Mapping[str, Any]


class Layout(Protocol):
    """How a method keeps a linear."""

    SUFFIXES: tuple[str, ...]  # of the tensors it is made of; the first tells that there is one

    def check(self, config: Config) -> None:
        """Raise CheckpointError naming a key whose value cannot be read."""
        ...

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        """Whether the module, which has the first suffix, is quantised."""
        ...

    def shape(self, checkpoint: Checkpoint, module: str, config: Config) -> tuple[int, ...]: ...

    def tensor(self, checkpoint: Checkpoint, module: str, config: Config) -> Tensor: ...


METHODS = {  # and the module that is its Layout
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "bitsandbytes": "bitsandbytes",
}
_LEFT_ALONE = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")


def layout_of(config: Config) -> Layout:
    """Raises CheckpointError for a method nobody here reads, or an option of it."""
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        raise CheckpointError(
            f"quantization_config: quant_method {method!r} is not supported; {', '.join(METHODS)} are"
        )
    layout: Layout = importlib.import_module(f"{__name__}.{METHODS[method]}")
    layout.check(config)
    return layout


class QuantisedCheckpoint:
    """A Checkpoint in which quantised linears are matrices."""

    def __init__(self, checkpoint: Checkpoint, config: Config):
        self._checkpoint, self._config, self._layout = checkpoint, config, layout_of(config)
        suffixes = self._layout.SUFFIXES
        self._modules = {
            name.removesuffix(suffix)
            for name in checkpoint.names()
            for suffix in suffixes
            if name.endswith(suffix) and self._layout.holds(checkpoint, name.removesuffix(suffix))
        }
        self._check_left_alone()
        self._last: tuple[str, Tensor] | None = None  # the parts of a fused matrix are asked for one after another

    def _check_left_alone(self) -> None:
        for key in _LEFT_ALONE:
            for listed in self._config.get(key) or ():
                matches = _matcher(str(listed))
                if wrong := next((module for module in sorted(self._modules) if matches(module)), None):
                    raise CheckpointError(
                        f"quantization_config: {key} names {listed!r}, but {self._checkpoint.where(wrong)} holds "
                        f"{wrong} quantised"
                    )

    def _module(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if module != name and module in self._modules else None

    def names(self) -> list[str]:
        parts = {module + suffix for module in self._modules for suffix in self._layout.SUFFIXES}
        plain = [name for name in self._checkpoint.names() if name not in parts]
        return list(dict.fromkeys([*plain, *(module + ".weight" for module in sorted(self._modules))]))

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._module(name)
        if module is None:
            return self._checkpoint.shape(name)
        return self._told(module, self._layout.shape)

    def tensor(self, name: str) -> Tensor:
        module = self._module(name)
        if module is None:
            return self._checkpoint.tensor(name)
        if self._last is None or self._last[0] != module:
            self._last = None
            self._last = module, self._told(module, self._layout.tensor)
        return self._last[1]

    def _told(self, module: str, ask: Any) -> Any:
        try:
            return ask(self._checkpoint, module, self._config)
        except KeyError as error:
            raise CheckpointError(f"{self.where(module)}: {module} is quantised, but there is no {error}") from None

    def where(self, name: str) -> str:
        module = self._module(name)
        if module is not None:
            parts = (module + suffix for suffix in self._layout.SUFFIXES)
            name = next((part for part in parts if has(self._checkpoint, part)), name)
        return self._checkpoint.where(name)

    def close(self) -> None:
        self._last = None
        self._checkpoint.close()


def _matcher(listed: str) -> Any:
    """Whether a module is meant by an entry of an ignore list: its name, the end of its name, or re:EXPRESSION."""
    if listed.startswith("re:"):
        expression = re.compile(listed[3:])
        return lambda module: expression.match(module) is not None
    return lambda module: module == listed or module.endswith("." + listed)
