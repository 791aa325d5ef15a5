"""Request bodies. Types are strict: "5" is not a number. Every field may be null, which means its default.

A field that is not declared here lands in `model_extra`: when it is in UNSUPPORTED, it is refused unless its value asks
for nothing; otherwise it is accepted and named in the x-martlet-ignored-fields header.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

MAX_MESSAGES, MAX_TOOLS = 4096, 128

# Lists stop at the first bad element: a hostile body must not make millions of error objects.
Strings = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[int], Field(fail_fast=True, max_length=2**18)]
# Checked by hand (prompts.py, sampling.py): trying a union member by member over a long list of ids is slow.
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation]
LogitBias = Annotated[dict[str, float] | None, SkipValidation]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingBody(Body):
    """What all generating endpoints share. Bounds are checked by SamplingParams, once for every door."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: LogitBias = None
    allowed_token_ids: Integers | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None


class GenerationBody(SamplingBody):
    """What chat completions and completions share besides. The last five are the client's own marks and hints about
    the cache, which finds common prefixes without them: they change nothing and are logged nowhere.
    """

    n: int | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None


class CompletionBody(GenerationBody):
    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None


class ContentPart(Body):
    type: str
    text: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn. Fields beside these (reasoning_content ...) go to the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None


class Function(Body):
    """parameters: a JSON Schema of an object; without one, the function takes none."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: FunctionName


Messages = Annotated[list[Message], Field(fail_fast=True, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
Functions = Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS)]


class ChatBody(GenerationBody):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    """Of a prompt, or of messages, with tools, as the chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Integers


class EmbeddingBody(Body):
    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class LoadAdapterBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadAdapterBody(Body):
    lora_name: str


# Fields of the OpenAI API and of vLLM that would change the answer and that we cannot honour yet, with the values
# besides null that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "prompt_embeds": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "bad_words": ([],),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "watermarking": (),
    "echo": (False,),  # of a chat
    "add_special_tokens": (),
    "documents": ([],),
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "stream_interval": (1,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
    "continuous_usage_stats": (False,),  # of stream_options
    "request_id": (),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "mm_payload": (),
    "return_weight_versions": (False,),
    "routed_experts_prompt_start": (),
}
