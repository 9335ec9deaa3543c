"""LlamaIndex' OpenAILike: python llamaindex_client.py URL MODEL."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, name = sys.argv[1:]
model = OpenAILike(
    model=name,
    api_base=f"{url}/v1",
    api_key="unused",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=2000,
    max_retries=0,
)


class Place(BaseModel):
    """Where something is."""

    city: str


def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"sunny in {city}"


assert model.chat([ChatMessage(role="user", content="say Grüße 🎉")]).message.content == "Grüße 🎉"
assert model.complete("say Grüße").text == "Grüße"
print("chat")
deltas = [each.delta or "" for each in model.stream_chat([ChatMessage(role="user", content="say Grüße 🎉")])]
assert "".join(deltas) == "Grüße 🎉"
print("stream")
told = model.predict_and_call([FunctionTool.from_defaults(weather)], 'call weather {"city":"Köln"}')
assert told.response == "sunny in Köln", told
print("tool")
assert model.as_structured_llm(Place).complete('call Place {"city":"Köln"}').raw == Place(city="Köln")
print("object")
