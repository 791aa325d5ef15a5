"""POST /tokenize and /detokenize: what a text is to the model, without running it."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from martlet.errors import InvalidRequest
from martlet.server.answers import Text, Tokens, answers
from martlet.server.errors import ApiError
from martlet.server.logprobs import token_name
from martlet.server.prompts import characters, chat_messages, check_ids, check_text, off_loop, prompt_style
from martlet.server.routing import JsonRoute, json_answer
from martlet.server.sampling import extra_fields
from martlet.server.schema import DetokenizeBody, TokenizeBody
from martlet.server.service import Service
from martlet.server.tools import check_history, read_listed

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/tokenize",
    summary="Token ids of a prompt, or of messages as the chat template writes them",
    responses=answers(Tokens),
)
async def tokenize(body: TokenizeBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    service.model_name(body.model)
    ignored = extra_fields(body)
    ids = await _ids(service, body)
    tokenizer = service.backend.tokenizer
    names = [token_name(tokenizer.token_bytes(token)) for token in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": service.backend.max_model_len, "tokens": ids, "token_strs": names}
    return json_answer(answer, ignored=ignored)


async def _ids(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise InvalidRequest(f"{name} is for messages, not for a prompt", param=name)
        check_text(body.prompt, "prompt")
        tokenizer = service.backend.tokenizer
        special = body.add_special_tokens is not False
        encode = tokenizer.encode_prompt if special else lambda text: tokenizer.encode(text, special=True)
        return await off_loop(len(body.prompt), encode, body.prompt)
    if body.add_special_tokens:
        raise InvalidRequest("add_special_tokens is for a prompt; a chat template brings its own", param="messages")
    if service.template is None:
        raise ApiError(400, "this model has no chat template; send a prompt", param="messages")
    template, style = service.template, prompt_style(body)
    messages = chat_messages(body)
    check_history(body.messages or ())
    tools = read_listed(body.tools)
    return await off_loop(characters((messages, tools)), lambda: template.render(messages, tools=tools, **style))


@router.post("/detokenize", summary="The text that token ids spell", responses=answers(Text))
async def detokenize(body: DetokenizeBody, http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    service.model_name(body.model)
    check_ids(body.tokens, service.backend.vocab_size, "tokens")
    decode = service.backend.tokenizer.decode
    text = await off_loop(len(body.tokens), lambda: decode(body.tokens, skip_special=False))
    return json_answer({"prompt": text}, ignored=extra_fields(body))
