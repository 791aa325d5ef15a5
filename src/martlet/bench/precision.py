"""In which number type a model's weights lie on disk, so that like is compared with like."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path


def stored(path: Path) -> str:
    """The type that most bytes of a model have: 'q8_0' of a .gguf, 'bfloat16' of a Hugging Face folder, 'int8' of an
    OpenVINO folder; 'auto' where nothing says it."""
    if path.suffix == ".gguf":
        return _gguf(path)
    ir = path / "openvino_model.xml"
    if ir.is_file():
        text = ir.read_text(encoding="utf-8")
        marks = {"int4": ("u4", "i4"), "int8": ("u8", "i8"), "bfloat16": ("bf16",), "float16": ("f16",)}
        return next((n for n, kinds in marks.items() if any(f'element_type="{k}"' in text for k in kinds)), "float32")
    config = path / "config.json"
    if config.is_file():
        known = json.loads(config.read_text(encoding="utf-8"))
        return known.get("dtype") or known.get("torch_dtype") or "auto"
    return "auto"


def bits(name: str) -> int | None:
    """4 of 'q4_1' or 'int4', 16 of 'bf16'; None of 'auto'."""
    number = re.search(r"\d+", name)
    return int(number.group()) if number else None


def _gguf(path: Path) -> str:
    from martlet.hub.gguf_header import BLOCK_TYPES, read_header

    sizes: Counter[str] = Counter()
    for tensor in read_header(path).tensors.values():
        block = BLOCK_TYPES[tensor.type_id]
        sizes[block.name] += tensor.nbytes
    return sizes.most_common(1)[0][0]
