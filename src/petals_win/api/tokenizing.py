"""/tokenize and /detokenize, as vLLM and llama.cpp have them. Knows their fields; which tokens a text has, the engine knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, Field, StrictInt, model_validator

from petals_win.api import reply_schemas as sent
from petals_win.api.errors import ApiError
from petals_win.api.schemas import ChatRequest, Message, Text
from petals_win.engines.base import Engine, GenerationRequest, ModelCard, find_model

_ERRORS = sent.errors(400, 401, 403, 404, 408, 413, 500, 503)


class TokenizeRequest(ChatRequest):
    """Body of POST /tokenize: a text, or a conversation with what else /v1/chat/completions takes."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = ChatRequest.refused | {"with_pieces": bool}

    model: Annotated[Text, Field(description="may be left out where there is one model")] = ""
    messages: list[Message] = []
    prompt: Annotated[Text | None, Field(description="a text; llama.cpp's name of it is content")] = None
    add_special_tokens: Annotated[
        bool | None,
        Field(description="whether a text gets the tokens that begin and end one; llama.cpp's name is add_special"),
    ] = None
    return_token_strs: Annotated[bool, Field(description="the text of each token, too")] = False

    @model_validator(mode="before")
    @classmethod
    def _of_llama_cpp(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "content" not in data or "prompt" in data:
            return data
        data = dict(data)
        special = data.pop("add_special", None)
        return {"add_special_tokens": bool(special), **data, "prompt": data.pop("content")}

    def request(self, model: str) -> GenerationRequest:
        """What is to be read. Raises ApiError unless it is either a text or a conversation."""
        if (self.prompt is None) == (not self.messages):
            raise ApiError(400, "Either prompt or messages is needed.", param="prompt")
        if self.prompt is not None:
            return GenerationRequest(model=model, prompt=self.prompt)
        if self.add_special_tokens:
            raise ApiError(
                400,
                "add_special_tokens: in a conversation the chat template says where special tokens are. Leave it out.",
                param="add_special_tokens",
            )
        return self.requests(model)[0]


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model: Annotated[Text, Field(description="may be left out where there is one model")] = ""
    tokens: list[Annotated[StrictInt, Field(ge=0, lt=2**31)]]


class Tokens(BaseModel):
    count: int
    max_model_len: int = Field(description="tokens of prompt and answer together")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="of each token its text, if return_token_strs is true")


class Detokenized(BaseModel):
    prompt: str = Field(description="the text, with that of special tokens")
    content: str = Field(description="the same, as llama.cpp calls it")


def tokenizing_routes(engine: Engine) -> APIRouter:
    """What needs a key, where keys are set."""
    router = APIRouter()

    @router.post("/tokenize", response_model=Tokens, responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """The tokens of a text or of a conversation, as the model would read it."""
        card = _model(engine, body.model)
        tokens = await engine.tokenize(body.request(card.id), special=body.add_special_tokens is not False)
        texts = [await engine.detokenize(card.id, [token]) for token in tokens] if body.return_token_strs else None
        return Tokens(count=len(tokens), max_model_len=card.context_length, tokens=tokens, token_strs=texts)

    @router.post("/detokenize", response_model=Detokenized, responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of tokens."""
        text = await engine.detokenize(_model(engine, body.model).id, body.tokens)
        return Detokenized(prompt=text, content=text)

    return router


def _model(engine: Engine, asked: str) -> ModelCard:
    cards = engine.models()
    return cards[0] if not asked and len(cards) == 1 else find_model(asked, cards)
