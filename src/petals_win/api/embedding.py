"""Texts as vectors: OpenAI's /v1/embeddings and Ollama's two paths. Knows their fields; what a vector is, the engine knows."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StrictInt, field_validator

from petals_win.api import reply_schemas as sent
from petals_win.api.answering import unless_disconnected
from petals_win.api.errors import ApiError
from petals_win.api.generations import Generations
from petals_win.api.ollama_replies import OllamaError
from petals_win.api.schemas import Text
from petals_win.engines.base import Engine, GenerationRequest, find_model

MAX_INPUTS = 64
_STATUSES = (400, 401, 403, 404, 408, 413, 429, 500, 503)
_ERRORS = sent.errors(*_STATUSES)
_OLLAMA_ERRORS = sent.errors(*_STATUSES, body=OllamaError)

TokenIds = list[StrictInt]


class EmbeddingsRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model: Text
    input: Annotated[
        Text | list[Text] | TokenIds | list[TokenIds],
        Field(description=f"a text or token ids, or a list of at most {MAX_INPUTS} of either"),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"], Field(description="base64: 32-bit floats, little-endian")
    ] = "float"
    dimensions: Annotated[int | None, Field(ge=1, description="none but the model's own can be had")] = None

    @field_validator("input", mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        """One sentence instead of one for each of the four kinds."""
        many = value if isinstance(value, list) else [value]
        lists = [item for item in many if isinstance(item, list)] or [many]
        kinds = {type(item) for item in many}
        if len(kinds) != 1 or not kinds <= {str, int, list} or not (kinds == {str} or all(map(_are_token_ids, lists))):
            raise ValueError("a text, a list of texts, a list of token ids or a list of such lists is needed")
        return value

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


class OllamaEmbed(BaseModel):
    """Body of POST /api/embed."""

    model: Text
    input: Annotated[Text | list[Text], Field(description=f"a text, or a list of at most {MAX_INPUTS}")]
    truncate: Annotated[bool | None, Field(description="cut off what is longer than the context")] = True
    dimensions: Annotated[int | None, Field(ge=1, description="none but the model's own can be had")] = None


class OllamaEmbeddings(BaseModel):
    """Body of POST /api/embeddings, the older one of Ollama's two."""

    model: Text
    prompt: Text


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class OllamaEmbedded(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int = Field(description="nanoseconds")
    load_duration: int = Field(description="nanoseconds; the model is there already")
    prompt_eval_count: int = Field(description="tokens")


class OllamaEmbedding(BaseModel):
    embedding: list[float]


def embedding_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What needs a key, where keys are set."""
    router = APIRouter()

    async def embed(
        http: Request,
        model: str,
        inputs: Sequence[str | list[int]],
        dimensions: int | None = None,
        *,
        truncate: bool = False,
    ) -> tuple[list[list[float]], int]:
        """The vectors of the inputs, computed one after the other in the place of an answer, and how many tokens they have."""
        if not 0 < len(inputs) <= MAX_INPUTS:
            raise ApiError(400, f"input: 1 to {MAX_INPUTS} texts in one request, not {len(inputs)}.", param="input")
        texts = [
            await engine.tokenize(
                GenerationRequest(model=model, prompt=text if isinstance(text, str) else tuple(text))
            )
            for text in inputs
        ]
        if truncate:
            longest = find_model(model, engine.models()).context_length
            texts = [tokens[:longest] for tokens in texts]

        async def work() -> list[list[float]]:
            vectors: list[list[float]] = []
            for tokens in texts:
                vectors.append(await engine.embed(model, tokens))
                if dimensions not in (None, len(vectors[0])):
                    raise ApiError(
                        400,
                        f"dimensions: {model} makes vectors of {len(vectors[0])} numbers and no others. Leave it out.",
                        param="dimensions",
                    )
            return vectors

        return await unless_disconnected(http, generations.run(work)), sum(map(len, texts))

    @router.post("/v1/embeddings", response_model=EmbeddingList, responses=_ERRORS)
    async def embeddings(http: Request, body: EmbeddingsRequest) -> EmbeddingList:
        """Texts as vectors of length 1: the mean of the model's last hidden states. Models made for it do better."""
        model = find_model(body.model, engine.models()).id
        vectors, tokens = await embed(http, model, body.inputs, body.dimensions)
        shown = [_base64(vector) if body.encoding_format == "base64" else vector for vector in vectors]
        data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(shown)]
        return EmbeddingList(data=data, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))

    @router.post("/api/embed", response_model=OllamaEmbedded, responses=_OLLAMA_ERRORS)
    async def ollama_embed(http: Request, body: OllamaEmbed) -> OllamaEmbedded:
        """As /v1/embeddings, for Ollama's clients."""
        began = time.perf_counter_ns()
        inputs = [body.input] if isinstance(body.input, str) else body.input
        model, truncate = _of_ollama(engine, body.model), body.truncate is not False
        vectors, tokens = await embed(http, model, inputs, body.dimensions, truncate=truncate)
        return OllamaEmbedded(
            model=body.model,
            embeddings=vectors,
            total_duration=time.perf_counter_ns() - began,
            load_duration=0,
            prompt_eval_count=tokens,
        )

    @router.post("/api/embeddings", response_model=OllamaEmbedding, responses=_OLLAMA_ERRORS)
    async def ollama_embeddings(http: Request, body: OllamaEmbeddings) -> OllamaEmbedding:
        """As /api/embed for one text, for Ollama's older clients."""
        vectors, _ = await embed(http, _of_ollama(engine, body.model), [body.prompt], truncate=True)
        return OllamaEmbedding(embedding=vectors[0])

    return router


def _are_token_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)


def _of_ollama(engine: Engine, name: str) -> str:
    return find_model(name.removesuffix(":latest"), engine.models()).id


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
