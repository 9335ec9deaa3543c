"""Token ids for a request: chat templates of many kinds, turns that are continued, the token that begins a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from petals_win.engines.base import GenerationRequest
from petals_win.engines.prompts import PromptEncoder
from petals_win.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As older templates of Llama and Mistral: no role but two, in turn, and the text trimmed.
IN_TURN = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[I]' + message['content'] | trim + '[/I]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
PASSES_OVER = (
    "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
KNOWS_TOOLS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + ':' }}"
    "{% for key, value in call.function.arguments.items() %}{{ key + '=' + value | tojson }}{% endfor %}{% endfor %}"
    "{% if message.role == 'tool' %}{{ ' by ' + message.name + ' for ' + message.tool_call_id }}{% endif %}"
    "{{ '</s>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)


def tokenizer(template: str | None = CHATML, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each character of ASCII, and a few special ones."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code for code in range(3, 128)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made


def read(by: str | None, /, *messages: dict[str, Any], **settings: Any) -> str:
    """What the model reads, as text."""
    made = tokenizer(by)
    prompt = PromptEncoder("M", made, 128).encode(GenerationRequest(model="M", messages=messages, **settings))
    return made.decode(prompt.tokens)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


WEATHER = (
    user("Sun?"),
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
        ],
    },
    {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "c1", "name": "weather"},
)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)


def test_a_turn_begins():
    assert read(CHATML, user("Hi")) == "<|user|>Hi</s><|assistant|>"
    assert read(CHATML, user("Hi"), generation_prompt=False) == "<|user|>Hi</s>"


@pytest.mark.parametrize("template", [CHATML, IN_TURN])
@pytest.mark.parametrize("end", ["", " ", " \t "])
def test_the_assistants_turn_is_continued(template, end):
    begun = read(template, user("Hi"), assistant("It is" + end), continue_final=True)
    assert begun.endswith("It is"), "no end of turn, and no blank that would be a token of its own"


def test_line_ends_before_the_answer_stay():
    assert read(CHATML, user("Hi"), assistant("Code:\n"), continue_final=True).endswith("Code:\n")


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_turn_is_one_that_begins(text):
    asked = (user("Hi"), assistant(text))
    assert read(CHATML, *asked, continue_final=True) == "<|user|>Hi</s><|assistant|>"


def test_where_the_answer_joins_on():
    encoder = PromptEncoder("M", tokenizer(), 128)

    def joins(**request: Any) -> tuple[str, str]:
        prompt = encoder.encode(GenerationRequest(model="M", **request))
        return tokenizer().decode(prompt.before), prompt.blanks

    assert joins(messages=(user("Hi"),)) == ("", "")
    assert joins(messages=(user("Hi"), assistant("The day is  ")), continue_final=True) == ("e day is", "  ")
    assert joins(prompt="abc") == ("<s>abc", "")


def test_tools_as_the_template_knows_them():
    assert read(KNOWS_TOOLS, *WEATHER) == (
        '<|user|>Sun?</s><|assistant|><call>weather:city="Ulm"</s>'
        '<|tool|>{"sky": "clear"} by weather for c1</s><|assistant|>'
    )


def test_a_template_that_shows_the_role_but_not_the_call():
    text = read(CHATML, *WEATHER)
    call = '{"name": "weather", "arguments": {"city": "Ulm"}}'
    assert f"<|assistant|><tool_call>\n{call}\n</tool_call></s>" in text, "as calls are asked for"
    assert '<|user|>Result of weather:\n{"sky": "clear"}</s>' in text


@pytest.mark.parametrize("template", [IN_TURN, PASSES_OVER])
def test_a_template_that_refuses_tools_or_passes_over_them(template):
    text = read(template, *WEATHER, user("Thanks"))
    assert '"name": "weather"' in text
    assert 'Result of weather:\n{"sky": "clear"}\n\nThanks' in text, "one turn of the user"


def test_results_without_a_call():
    assert "[I]Result:\n7[/I]" in read(IN_TURN, {"role": "tool", "content": "7"})


def test_tools_are_told_as_the_template_has_it():
    template = "{% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}" + KNOWS_TOOLS
    assert read(template, *WEATHER, tools=TOOLS).startswith('{"name": "weather", "parameters": {')
    assert read(template, *WEATHER, tools=TOOLS, tool_choice="none") == read(KNOWS_TOOLS, *WEATHER)


@pytest.mark.parametrize("text", ["Sun?", "Is there a tool named weather?"])
def test_tools_are_told_in_the_system_turn_to_a_template_that_knows_none(text):
    """Also where the name of a tool is there for another reason."""
    told = read(CHATML, {"role": "system", "content": "Be brief."}, user(text), tools=TOOLS)
    assert told.startswith("<|system|>Be brief.\n\nYou can call tools")
    assert "<tool_call>\n{" in told and '{"name": "weather", "parameters": {' in told
    assert read(CHATML, user(text), tools=TOOLS).startswith("<|system|>You can call tools")
    assert read(CHATML, user(text), tools=TOOLS, tool_choice="none") == read(CHATML, user(text))


@pytest.mark.parametrize(("template", "begin"), [(IN_TURN, "[I]"), (PASSES_OVER, "<|user|>")])
def test_tools_are_told_by_the_user_where_a_system_turn_is_refused_or_passed_over(template, begin):
    told = read(template, *WEATHER, tools=TOOLS)
    assert told.startswith(begin + "You can call tools") and told.count('{"name": "weather", "parameters"') == 1
    assert "\n\nSun?" in told and "<tool_call>\n" in told and "Result of weather" in told


def test_a_template_that_shows_nothing_of_tools():
    with pytest.raises(UserError, match="shows no tools"):
        read("{{ messages | length }}", user("Hi"), tools=TOOLS)


def test_variables_of_the_template():
    template = "{{ 'think' if enable_thinking else 'answer' }}{{ reasoning_effort }}"
    assert read(template, user("Hi"), template={"enable_thinking": True, "reasoning_effort": "low"}) == "thinklow"
    assert read(template, user("Hi"), template={"unknown": 1}) == "answer"
    for name in ("chat_template", "tokenize", "tools", "messages", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"chat_template_kwargs: {name} cannot be set"):
            read(template, user("Hi"), template={name: "x"})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 + messages[0]['content'] }}", "unsupported operand"),
        ("{{ messages[0]['content'] / 0 }}", "TypeError"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[9]['content'] }}", "has no element 9"),
        ("{% if %}", "Expected an expression"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('Only about cats.\\nSecond line') }}", "Only about cats[.]$"),
        ("{{ messages[0].content | no_such_filter }}", "no_such_filter"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange too big"),
    ],
)
def test_whatever_a_template_raises_is_told(template, words):
    with pytest.raises(UserError, match=f"^The chat template of M does not take these messages: .*{words}") as caught:
        read(template, user("Hi"))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_words_of_a_template_that_are_a_novel():
    with pytest.raises(UserError) as caught:
        read("{{ raise_exception('a' * 100000) }}", user("Hi"))
    assert len(str(caught.value)) < 400


def test_text_that_no_tokenizer_takes():
    with pytest.raises(UserError, match="does not take these messages"):
        read(
            CHATML,
            *WEATHER[:1],
            {**WEATHER[1], "tool_calls": [{"id": "", "function": {"name": "x", "arguments": "\ud800"}}]},
        )


def test_a_model_without_a_template():
    with pytest.raises(UserError, match="no chat template"):
        read(None, user("Hi"))


def test_a_text_begins_with_one_bos():
    def ids(text: str, adds_bos: bool) -> list[int]:
        made = tokenizer(adds_bos=adds_bos)
        return PromptEncoder("M", made, 128).encode(GenerationRequest(model="M", prompt=text)).tokens

    assert ids("ab", True) == ids("<s>ab", True) == ids("<s>ab", False) == [1, 97, 98]
    assert ids("ab", False) == [97, 98]
    assert ids("<s>", True) == [1]
    assert ids("<s><s>a", True) == [1, 1, 97], "two on purpose"
