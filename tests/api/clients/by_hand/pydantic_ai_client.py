"""pydantic-ai's agents: python pydantic_ai_client.py URL MODEL."""

import asyncio
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, name = sys.argv[1:]
model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused"))


class Place(BaseModel):
    city: str


async def streamed() -> str:
    async with Agent(model).run_stream("say Grüße 🎉") as answer:
        return "".join([piece async for piece in answer.stream_text(delta=True)])


assert Agent(model).run_sync("say Grüße 🎉").output == "Grüße 🎉"
print("chat")
assert asyncio.run(streamed()) == "Grüße 🎉"
print("stream")
agent = Agent(model)


@agent.tool_plain
def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"say sunny in {city}"


assert agent.run_sync('call weather {"city":"Köln"}').output == "sunny in Köln"
print("tool")
assert Agent(model, output_type=Place).run_sync('call final_result {"city":"Köln"}').output == Place(city="Köln")
assert Agent(model, output_type=NativeOutput(Place)).run_sync('say {"city":"Köln"}').output == Place(city="Köln")
print("object")
