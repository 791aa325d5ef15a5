"""Flags that several commands share, and the one place that turns them into a loaded model and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from martlet.cli.adapters import AdapterFlags, Chosen, choose, with_slots
from martlet.cli.flags import flag
from martlet.collection import uncollected
from martlet.errors import UsageError

if TYPE_CHECKING:
    from martlet.backends.base import Backend
    from martlet.chat import Template
    from martlet.engine.options import EngineOptions
    from martlet.engine.request import Request
    from martlet.hub.card import ModelCard
    from martlet.runners.base import LoadOptions

DEFAULT_MODEL = "smollm2-135m-instruct"
DTYPES = {"auto": "auto", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # SWIFT's names
KV_DTYPES = ("auto", "bf16", "fp8", "int8")
BACKENDS = ("auto", "native", "pt", "vllm")


@dataclass(frozen=True)
class ModelFlags:
    """Model."""

    model: str | None = flag(
        f"a registered name, a folder or .gguf file, or a source such as hf:NAME (default: {DEFAULT_MODEL})",
        None,
        metavar="NAME",
    )
    model_type: str | None = flag(
        "a registered model by its SWIFT key, such as qwen-7b-chat; beside a path, whose template it takes",
        None,
        metavar="KEY",
    )
    model_id_or_path: str | None = flag("SWIFT's name for --model", None, metavar="PATH")
    model_revision: str | None = flag("branch, tag or commit of a repository", None, metavar="NAME")
    load_format: str = flag(
        "dummy makes up random weights from a config.json", "auto", choices=("auto", "safetensors", "gguf", "dummy")
    )
    template_type: str | None = flag("chat template to use instead of the model's own", None, metavar="NAME")
    infer_backend: str = flag(
        "native is our engine, pt is transformers, vllm an installed vLLM", "auto", choices=BACKENDS
    )
    device: str = flag("where to run", "auto", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("number type of weights and activations", "auto", choices=DTYPES)
    quant: str | None = flag(
        "smaller weights, made when the model is loaded, where the runner can", None, metavar="NAME"
    )
    packed_cache: bool = flag("keep weights as the CPU kernels want them on disk, for faster starts", True)
    max_model_len: int | None = flag("longest sequence, prompt and answer together (default: the model's)", None)


@dataclass(frozen=True)
class EngineFlags:
    """Engine."""

    max_num_seqs: int | None = flag("most sequences in a batch (default: decided from the memory)", None)
    max_num_batched_tokens: int | None = flag("most tokens in a step, and the prefill chunk", None)
    gpu_memory_utilization: float = flag(
        "share of the free memory that weights and KV cache may take, on a GPU as on a CPU",
        0.9,
        aliases=("memory_utilization",),
    )
    kv_cache_tokens: int | None = flag("size of the KV cache in tokens (default: from the memory)", None)
    kv_cache_dtype: str = flag(
        "how keys and values are kept; fp8 (on a GPU) and int8 (on a CPU, where auto is that beside --quant int8) "
        "hold twice the tokens and decode faster",
        "auto",
        choices=KV_DTYPES,
    )
    enable_prefix_caching: bool = flag("keep the KV of prompts for requests that begin the same", True)
    speculative_tokens: int = flag(
        "on a CPU, guess this many tokens a step from the text so far and verify them together; answers stay the same",
        0,
    )
    tensor_parallel_size: int = flag("GPUs that share the model, each with a part of every layer", 1)


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling (a flag that is not given follows the model's generation_config)."""

    max_new_tokens: int = flag("longest answer in tokens", 2048)
    temperature: float | None = flag("0 always takes the likeliest token", None)
    top_k: int | None = flag("draw from the k likeliest tokens; 0 or -1: from all", None)
    top_p: float | None = flag("draw from the likeliest tokens that add up to p", None)
    repetition_penalty: float | None = flag("above 1 discourages tokens that already occurred", None)
    do_sample: bool | None = flag("false is greedy, whatever the other flags say", None)
    stop_words: tuple[str, ...] = flag("texts that end an answer; they are not part of it", ())
    seed: int | None = flag("makes sampling repeatable (default: random)", None)


def resolve_model(flags: ModelFlags, chosen: Chosen | None = None) -> ModelCard:
    """The model that was asked for, or the default one; fetched when it is not on this machine yet.

    chosen: what adapter flags make of the model's own.
    """
    from martlet import hub
    from martlet.cli.progress import download_bar

    if flags.model and flags.model_id_or_path and flags.model != flags.model_id_or_path:
        raise UsageError(
            f"--model {flags.model} and --model_id_or_path {flags.model_id_or_path} differ; give one of them",
            param="model",
        )
    chosen = chosen or Chosen(flags.model or flags.model_id_or_path, flags.model_type)
    with download_bar() as progress:
        card = hub.resolve(
            chosen.model or chosen.model_type or DEFAULT_MODEL,
            progress=progress,
            model_type=chosen.model_type if chosen.model else None,
            load_format=flags.load_format,
            revision=flags.model_revision,
        )
    if chosen.merge is None:
        return card
    if card.format != "safetensors":
        raise UsageError(
            f"--merge_lora true: {card.name} is a {card.format} checkpoint, and adapters are merged into safetensors "
            "only; without the flag it is served beside the model",
            param="merge_lora",
        )
    return replace(card, merge=chosen.merge)


def template_name(flags: ModelFlags) -> str | None:
    name = flags.template_type
    return None if name is None or name.upper() == "AUTO" else name  # AUTO is SWIFT's word for the model's own


def load_options(model: ModelFlags, engine: EngineFlags) -> LoadOptions:
    from martlet.runners.base import LoadOptions

    return LoadOptions(
        device=model.device,
        dtype=DTYPES[model.dtype],
        quant=model.quant,
        max_model_len=model.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        kv_cache_tokens=engine.kv_cache_tokens,
        kv_dtype=engine.kv_cache_dtype,
        memory_utilization=engine.gpu_memory_utilization,
        packed_cache=model.packed_cache,
        tensor_parallel_size=engine.tensor_parallel_size,
    )


def engine_options(engine: EngineFlags, seed: int | None = None) -> EngineOptions:
    from martlet.engine.options import EngineOptions

    return EngineOptions(
        max_num_batched_tokens=engine.max_num_batched_tokens,
        enable_prefix_caching=engine.enable_prefix_caching,
        speculative_tokens=engine.speculative_tokens,
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to answer. template: None for a base model. own: the model's sampling settings.

    adapter: what it answers with, None for the base model.
    """

    backend: Backend
    template: Template | None
    own: Mapping[str, Any]
    adapter: str | None = None

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation; a base model continues the text of the last message."""
        if self.template is None:
            return self.backend.tokenizer.encode_prompt(messages[-1]["content"])
        return self.template.render(messages)

    def request(self, id: str, ids: list[int], flags: SamplingFlags, *, turn: bool, stream: bool = False) -> Request:
        """turn: the answer is a turn of a conversation and ends where the template says."""
        from martlet.engine.request import Request
        from martlet.sampling_params import SamplingParams

        room = self.backend.max_model_len - len(ids)
        wanted = flags.max_new_tokens
        template = self.template if turn else None
        params = SamplingParams(
            **sampling_settings(flags, self.own),
            max_tokens=min(wanted, room) if room > 0 else wanted,  # without room the engine refuses, with the numbers
            stop=(*flags.stop_words, *(template.stop if template else ())),
            stop_token_ids=template.stop_ids if template else (),
            seed=flags.seed,
        )
        return Request(id, ids, params, stream=stream, adapter=self.adapter)


def own_settings(card: ModelCard) -> dict[str, Any]:
    """Sampling settings of the model: its generation_config; greedy where that does not ask for sampling."""
    from martlet import backends

    settings = {"temperature": 1.0 if card.generation_config.get("do_sample") else 0.0}
    settings |= backends.generation_defaults(card)
    if card.generation_config.get("do_sample") is False:
        settings["temperature"] = 0.0
    return settings


def sampling_settings(flags: SamplingFlags, own: Mapping[str, Any]) -> dict[str, Any]:
    """Flags over the model's own settings. Whoever asks for sampling in any way gets it; --do_sample false ends it."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(flags, name)) is not None}
    settings = {**own, **given}
    if flags.do_sample is False:
        settings["temperature"] = 0.0
    elif "temperature" not in given and not settings["temperature"]:
        settings["temperature"] = 1.0 if flags.do_sample or "top_k" in given or "top_p" in given else 0.0
    return settings


def check_sampling(flags: SamplingFlags) -> None:
    """Raise for values that no model would take, before one is loaded for nothing."""
    from martlet.sampling_params import SamplingParams

    if flags.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens must be at least 1, got {flags.max_new_tokens}", param="max_new_tokens")
    SamplingParams(**sampling_settings(flags, {"temperature": 0.0}), stop=flags.stop_words, seed=flags.seed)


@uncollected(freeze=True)
def load(model: ModelFlags, engine: EngineFlags, adapters: AdapterFlags) -> Loaded:
    """Find the model, fetching it when it is not here yet, and load it, with the one adapter to answer with."""
    from martlet import backends, chat

    chosen = choose(model, adapters)
    if len(chosen.beside) > 1:
        raise UsageError(
            f"one adapter answers here, and {', '.join(chosen.beside)} are given; martlet deploy serves several",
            param="adapters",
        )
    options = with_slots(load_options(model, engine), adapters, chosen)
    card = resolve_model(model, chosen)
    backend = backends.load(
        card, backend=model.infer_backend, load=options, engine=engine_options(engine), adapters=chosen.beside
    )
    name = template_name(model)
    has_one = name or card.template or backend.tokenizer.chat_template
    template = chat.template_for(card, backend.tokenizer, name) if has_one else None
    return Loaded(backend, template, own_settings(card), next(iter(chosen.beside), None))
