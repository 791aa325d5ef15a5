"""Small random RWKV checkpoints of every version, in the names of the authors' files and in transformers' and fla's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from martlet.hub.card import ModelCard
from martlet.hub.resolver import card_of

VOCAB, WIDTH, HEAD, DEPTH, HIDDEN = 97, 64, 16, 3, 112
VERSIONS = ("5.0", "5.0-first", "5.1", "5.2", "6.0", "7.0")
MIX, DECAY, RATE, VALUE, GATE = 8, 12, 10, 6, 14  # ranks


def original(version: str, seed: int = 1) -> dict[str, np.ndarray]:
    """Random weights as the authors' files have them. "5.0-first": an early 5.0, with the logarithm of the bonus."""
    rng, heads, found = np.random.default_rng(seed), WIDTH // HEAD, {}

    def put(name: str, *shape: int, mean: float = 0.0, spread: float = 0.3) -> None:
        found[name] = (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        put(name + ".weight", rows, columns, spread=1.5 * columns**-0.5)

    def norm(name: str) -> None:
        put(name + ".weight", WIDTH, mean=1.0)
        put(name + ".bias", WIDTH)

    put("emb.weight", VOCAB, WIDTH, spread=1.0)
    norm("blocks.0.ln0")
    for layer in (f"blocks.{n}." for n in range(DEPTH)):
        norm(layer + "ln1")
        norm(layer + "ln2")
        norm(layer + "att.ln_x")
        for part in ("receptance", "key", "value", "output", *(["gate"] if version in ("5.1", "5.2", "6.0") else [])):
            linear(layer + "att." + part, WIDTH, WIDTH)
        linear(layer + "ffn.key", HIDDEN, WIDTH)
        linear(layer + "ffn.value", WIDTH, HIDDEN)
        if version != "7.0":
            linear(layer + "ffn.receptance", WIDTH, WIDTH)
        match version[0]:
            case "5":
                for part in "kvr" + "g" * (version in ("5.1", "5.2")):
                    put(f"{layer}att.time_mix_{part}", 1, 1, WIDTH, mean=0.5)
                shape = (heads, HEAD) if version == "5.2" else (heads,)
                put(layer + "att.time_decay", *shape, mean=-1.0, spread=1.0)
                put(layer + "att." + ("time_first" if version == "5.0-first" else "time_faaaa"), *shape)
                for part in "kr":
                    put(f"{layer}ffn.time_mix_{part}", 1, 1, WIDTH, mean=0.5)
            case "6":
                for part in "xwkvrg":
                    put(f"{layer}att.time_maa_{part}", 1, 1, WIDTH, mean=0.5)
                put(layer + "att.time_maa_w1", WIDTH, 5 * MIX)
                put(layer + "att.time_maa_w2", 5, MIX, WIDTH)
                put(layer + "att.time_decay", 1, 1, WIDTH, mean=-1.0, spread=1.0)
                put(layer + "att.time_decay_w1", WIDTH, DECAY)
                put(layer + "att.time_decay_w2", DECAY, WIDTH)
                put(layer + "att.time_faaaa", heads, HEAD)
                for part in "kr":
                    put(f"{layer}ffn.time_maa_{part}", 1, 1, WIDTH, mean=0.5)
            case "7":
                for part in "rwkvag":
                    put(f"{layer}att.x_{part}", 1, 1, WIDTH, mean=0.5)
                for part, rank in {"w": DECAY, "a": RATE, "v": VALUE, "g": GATE}.items():
                    if part != "g":
                        put(f"{layer}att.{part}0", 1, 1, WIDTH)
                    put(f"{layer}att.{part}1", WIDTH, rank)
                    put(f"{layer}att.{part}2", rank, WIDTH)
                put(layer + "att.k_k", 1, 1, WIDTH, mean=0.8)
                put(layer + "att.k_a", 1, 1, WIDTH, mean=1.0)
                put(layer + "att.r_k", heads, HEAD)
                put(layer + "ffn.x_k", 1, 1, WIDTH, mean=0.5)
    norm("ln_out")
    linear("head", VOCAB, WIDTH)
    return found


LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
OUTER = {"emb.weight": "rwkv.embeddings.weight", "head.weight": "head.weight", "ln_out": "rwkv.ln_out"}


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under the names of transformers (5, 6) or of flash-linear-attention (7)."""
    return {(_fla if "blocks.0.att.r_k" in weights else _transformers)(n): t for n, t in _oriented(weights)}


def _oriented(weights: dict[str, np.ndarray]):
    for name, tensor in weights.items():
        if name.split(".")[-1] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"):
            tensor = np.ascontiguousarray(tensor.T)
        if not name.startswith("blocks.0.att.v") or name.endswith("weight"):  # fla has no such map in its first layer
            yield name, tensor


def _transformers(name: str) -> str:
    name = name.replace("ln0", "pre_ln").replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    stem, _, part = name.rpartition("time_mix_")
    if stem:
        name = f"{stem}time_mix_{LONG[part]}"
    return name if name.startswith("head") else "rwkv." + name.replace("emb.", "embeddings.")


def _fla(name: str) -> str:
    outer = {"emb.": "model.embeddings.", "ln_out.": "model.norm.", "head.": "lm_head."}
    for theirs, ours in outer.items():
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    name = name.replace("blocks.", "model.layers.").replace(".ln0.", ".pre_norm.").replace(".ln1.", ".attn_norm.")
    name = name.replace(".ln2.", ".ffn_norm.").replace(".att.ln_x.", ".att.g_norm.").replace(".att.", ".attn.")
    for theirs, ours in {"receptance": "r", "key": "k", "value": "v", "output": "o"}.items():
        name = name.replace(f"attn.{theirs}.", f"attn.{ours}_proj.")
    part = name.rpartition(".")[2]
    if len(part) == 2 and part[1] in "012" and part[0] in "wavg":
        tail = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[part[1]]
        name = f"{name[:-2]}{part[0]}_lora.lora.{tail}"
    return name


def checkpoint(version: str, folder: Path, names: str = "original") -> ModelCard:
    """A random model in `folder`, in the authors' names without a config, or in Hugging Face's with one."""
    weights = original(version)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    if names == "hf":
        config = card_of(folder).config
        save_file(renamed(weights), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return card_of(folder)
