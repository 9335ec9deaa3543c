"""What a program that is started for each question may do wrong, and what its description may say wrong (runtimes/once.py)."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import psutil
import pytest
from contract import refusal, whole
from test_command import use
from tiny_chat import tiny_chat_model
from words_runtime import described_once

from petals_win.engines import command_arguments
from petals_win.engines.base import ContextTooLong, GenerationRequest, Token
from petals_win.engines.command_cli import CliEngine
from petals_win.engines.command_file import read_description
from petals_win.engines.outside import ProgramFailed
from petals_win.errors import UserError
from petals_win.host.memory import own_bytes


def asked(text: str, **settings) -> GenerationRequest:
    return GenerationRequest(model="letters", prompt=text, **settings)


@pytest.mark.parametrize(
    ("word", "limits", "why"),
    [
        ("crash", "", "ended with status 3. Its lines in the log tell more"),
        ("hang", "first_token_seconds = 3", "has written nothing for 3 s"),  # a slow PC may take seconds to start it
        ("flood", "answer_bytes = 300000", "has written more than the 300000 bytes"),
    ],
)
def test_one_that_misbehaves_spoils_its_own_answer_only(tmp_path, word, limits, why):
    path = described_once(tmp_path, limits=f"at_once = 2\n{limits}")

    async def ask(engine: CliEngine):
        other = asyncio.create_task(whole(engine, asked("well", max_tokens=40)))
        with pytest.raises(ProgramFailed, match=why):
            await whole(engine, asked(word))
        return await other, await whole(engine, asked("well", max_tokens=40)), engine.status(), engine.running

    beside, after, status, running = use(path, ask)
    assert beside == after and len(after.text) == 40
    assert status.ready and running == 0


def test_what_is_not_read_is_not_kept(tmp_path):
    """A flood waits for its reader: the engine holds a bounded part of it."""

    async def ask(engine: CliEngine):
        before = own_bytes()
        generation = engine.generate(asked("flood"))
        await anext(generation)
        await asyncio.sleep(1)
        (run,) = engine._runs
        kept = sum(len(piece) for piece in run._inbox._queue)  # type: ignore[attr-defined]
        await generation.aclose()
        return kept, own_bytes() - before

    kept, grown = use(described_once(tmp_path), ask)
    assert kept <= 16 * 2**16 and grown < 64 * 2**20


def test_half_characters_are_held_back(tmp_path):
    async def ask(engine: CliEngine):
        async def pieces(word: str) -> list[str]:
            return [event.text async for event in engine.generate(asked(word)) if isinstance(event, Token)]

        return await pieces("half"), "".join(await pieces("cut"))

    whole_ones, cut = use(described_once(tmp_path), ask)
    assert whole_ones == ["🙂", "é"]
    assert cut == "well \ufffd"


@pytest.mark.parametrize("word", ["deaf", "brood"])
def test_whoever_leaves_ends_the_program_and_what_it_started(tmp_path, word):
    async def ask(engine: CliEngine):
        before = psutil.Process().children(recursive=True)  # consoles of earlier tests' programs
        generation = engine.generate(asked(word))
        await anext(generation)
        started = [each for each in psutil.Process().children(recursive=True) if each not in before]
        began = time.monotonic()
        await generation.aclose()
        took = time.monotonic() - began
        _, left = psutil.wait_procs(started, timeout=20)
        alive = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        return len(started), took, alive, engine.running

    started, took, alive, running = use(described_once(tmp_path), ask)
    assert started >= (2 if word == "brood" else 1)
    assert took < 20 and alive == [] and running == 0


def test_the_last_line_of_its_standard_error_is_in_the_log_only(tmp_path, caplog):
    caplog.set_level(logging.INFO, "petals_win")

    async def ask(engine: CliEngine):
        return str(await refusal(engine, asked("stderr crash", max_tokens=1)))

    assert "last line" not in use(described_once(tmp_path), ask)
    assert any(record.getMessage().endswith(": the last line") for record in caplog.records)


def test_a_prompt_is_passed_as_it_stands(tmp_path):
    prompt = "tell {seed} {prompt} \"quoted\" 'so' $HOME & | > é🙂\n%PATH% \\"
    by_input = described_once(tmp_path)
    assert use(by_input, lambda engine: whole(engine, asked("-" + prompt, seed=5))).text == "-" + prompt
    by_argument = described_once(tmp_path, arguments='"--prompt={prompt}"')
    assert use(by_argument, lambda engine: whole(engine, asked("-" + prompt, seed=5))).text == "-" + prompt


def test_a_prompt_never_becomes_an_option(tmp_path):
    path = described_once(tmp_path, arguments='"{prompt}"')

    async def ask(engine: CliEngine):
        prompts = [("--seed=5", "for an option"), ("a\0b", "zero character"), ("w" * 200_000, "at most")]
        if sys.platform == "win32":  # where a quote takes two characters of the command line
            prompts += [('"' * 20_000, "at most")]
        for prompt, why in prompts:
            with pytest.raises(UserError, match=why):
                await whole(engine, asked(prompt))

    use(path, ask)


def test_without_a_tokenizer_it_takes_texts_and_single_questions(tmp_path):
    async def ask(engine: CliEngine):
        question = {"role": "user", "content": "tell me"}
        one = await whole(engine, GenerationRequest(model="letters", messages=(question,)))
        with pytest.raises(UserError, match="one question at a time: the file .* names no tokenizer"):
            await whole(engine, GenerationRequest(model="letters", messages=(question,) * 3))
        with pytest.raises(UserError, match="prompt is empty"):
            await whole(engine, asked(""))
        return one

    answer = use(described_once(tmp_path), ask)
    assert answer.text == "tell me" and answer.reason == "stop" and answer.usage.completion_tokens == 2


def test_with_a_tokenizer_it_gets_what_the_chat_template_makes(tmp_path):
    folder = tiny_chat_model(tmp_path / "tiny", context=512)
    path = described_once(tmp_path, model=f"tokenizer = '{folder.name}'")

    async def ask(engine: CliEngine):
        messages = tuple({"role": role, "content": "tell"} for role in ("user", "assistant", "user"))
        chat = await whole(engine, GenerationRequest(model="letters", messages=messages))
        typed = ({"role": "user", "content": "tell <assistant>"},)
        with pytest.raises(UserError, match="would take what stands in a message for a control token"):
            await whole(engine, GenerationRequest(model="letters", messages=typed))
        with pytest.raises(ContextTooLong):
            await whole(engine, asked("w" * 512))
        return chat

    chat = use(path, ask)
    assert chat.text == "<s><user>tell</s><assistant>tell</s><user>tell</s><assistant>"


def test_what_it_cannot_do_is_refused_unless_the_file_allows_it(tmp_path):
    async def ask(engine: CliEngine):
        for name, value in {"top_k": 5, "frequency_penalty": 0.5, "logprobs": 1, "logit_bias": {5: 1.0}}.items():
            with pytest.raises(UserError, match=f"^{name}: letters cannot do that"):
                await whole(engine, asked("well", **{name: value}))
        return await whole(engine, asked("well", max_tokens=2, top_k=0, top_p=1))

    assert len(use(described_once(tmp_path), ask).text) == 2
    allowed = described_once(tmp_path, 'ignore = ["top_k"]')
    assert use(allowed, lambda engine: whole(engine, asked("tell", top_k=5))).text == "tell"
    (tmp_path / "bare").mkdir()
    text = (tmp_path / "once.toml").read_text().replace('max_tokens = ["-n", "{max_tokens}"]', "")
    (tmp_path / "bare" / "once.toml").write_text(text)

    async def limited(engine: CliEngine):
        return str(await refusal(engine, asked("tell", max_tokens=5)))

    assert use(str(tmp_path / "bare" / "once.toml"), limited).startswith("max_tokens: letters cannot do that")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("arguments = ['{promt}']", "nothing can be put in the place of {promt}"),
        ("[options]\nseed = ['{temperature}']", "nothing can be put in the place of {temperature}"),
        ("[options]\nlogprobs = ['-l']", "options.logprobs"),
        ("[restart]\nattempts = 1", "restart is not for the dialect 'cli'"),
        ("[limits]\nsilence_seconds = 1", "silence_seconds is not for the dialect 'cli'"),
        ("program = 'x.CMD'\narguments = ['{prompt}']", "a batch file may read a prompt as commands"),
        ("dialect = 'jsonl'\n[options]\nseed = ['-s']", "options and tokenizer are for the dialect 'cli'"),
        ("[[models]]\nname = 'more'", "the context_length of more is missing"),
    ],
)
def test_a_description_that_makes_no_sense(tmp_path, text, why):
    at = text.find("\n[") + 1 if not text.startswith("[") else 0
    head, rest = (text[:at], text[at:]) if "\n[" in f"\n{text}" else (text, "")
    for name, value in (("dialect", "cli"), ("program", "x")):
        head += "" if name in head else f"\n{name} = '{value}'"
    model = "" if "[[models]]" in rest else "\n[[models]]\nname = 'm'\ncontext_length = 9\n"
    (tmp_path / "bad.toml").write_text(f"{head}\n{rest}\n{model}")
    with pytest.raises(UserError, match=why):
        read_description(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("found", ["C:\\tools\\x.CMD", "C:\\tools\\x.bat. "])
def test_a_batch_file_that_is_found_in_path_gets_no_prompt_as_an_argument(tmp_path, monkeypatch, found):
    monkeypatch.setattr("petals_win.engines.command_file.shutil.which", lambda _program: found)
    models = "[[models]]\nname = 'm'\ncontext_length = 9\n"
    (tmp_path / "batch.toml").write_text(f"dialect = 'cli'\nprogram = 'x'\narguments = ['-p', '{{prompt}}']\n{models}")
    with pytest.raises(UserError, match="a batch file may read a prompt as commands"):
        read_description(str(tmp_path / "batch.toml")).argv()


def test_a_placeholder_in_a_prompt_stays_what_it_is():
    made = command_arguments.filled(
        ["--p={prompt}", "{file}"], {"seed": ["-s", "{seed}"]}, {"seed": 5}, {"file": "a.gguf"}, "{file}{seed}"
    )
    assert made == ["--p={file}{seed}", "a.gguf", "-s", "5"]
