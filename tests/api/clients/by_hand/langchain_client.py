"""LangChain's ChatOpenAI: python langchain_client.py URL MODEL."""

import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, name = sys.argv[1:]
model = ChatOpenAI(model=name, base_url=f"{url}/v1", api_key="unused", max_retries=0)


class Place(BaseModel):
    city: str


@tool
def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"sunny in {city}"


assert model.invoke("say Grüße 🎉").content == "Grüße 🎉"
print("chat")
assert "".join(chunk.content for chunk in model.stream("say Grüße 🎉")) == "Grüße 🎉"
print("stream")
[call] = model.bind_tools([weather]).invoke('call weather {"city":"Köln"}').tool_calls
assert weather.invoke(call["args"]) == "sunny in Köln"
print("tool")
assert model.with_structured_output(Place).invoke('say {"city":"Köln"}') == Place(city="Köln")
print("object")
