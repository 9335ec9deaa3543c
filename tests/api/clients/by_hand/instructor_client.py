"""instructor over OpenAI's client: python instructor_client.py URL MODEL."""

import sys

import instructor
import openai
from pydantic import BaseModel

url, name = sys.argv[1:]
plain = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


class Place(BaseModel):
    city: str


def said(text: str) -> dict:
    return {"model": name, "messages": [{"role": "user", "content": text}], "max_retries": 0}


client = instructor.from_openai(plain)
assert (
    client.chat.completions.create(response_model=None, **said("say Grüße 🎉")).choices[0].message.content
    == "Grüße 🎉"
)
print("chat")
parts = list(client.chat.completions.create_partial(response_model=Place, **said('call Place {"city":"Köln"}')))
assert parts[-1].city == "Köln"
print("stream")
# Compared by its field: instructor keeps the raw answer in what it returns.
assert client.chat.completions.create(response_model=Place, **said('call Place {"city":"Köln"}')).city == "Köln"
print("tool")
client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
assert client.chat.completions.create(response_model=Place, **said('say {"city":"Köln"}')).city == "Köln"
print("object")
