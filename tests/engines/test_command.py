"""What a runtime may do wrong, and what a description may say wrong. The runtime is a program of its own (runtimes/words.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import psutil
import pytest
from contract import whole
from words_runtime import described

from petals_win.engines.base import GenerationRequest, Token
from petals_win.engines.command import CommandEngine, open_engine
from petals_win.engines.command_file import read_description
from petals_win.engines.command_messages import Violation, read_message
from petals_win.engines.outside import ProgramFailed, ProgramUnavailable
from petals_win.engines.registry import EngineSettings
from petals_win.errors import UserError

QUICK = "first_wait_seconds = 0.1"


def asked(text: str, **settings) -> GenerationRequest:
    return GenerationRequest(model="words", messages=({"role": "user", "content": text},), **settings)


def use(path: str, action: Callable[[CommandEngine], Awaitable], *, lost: bool = False):
    """Run an action on an engine that the description at `path` makes; nothing of it is left afterwards."""

    @contextlib.asynccontextmanager
    async def lives(engine: CommandEngine) -> AsyncIterator[list[UserError]]:
        reasons: list[UserError] = []
        await engine.start(reasons.append)
        try:
            yield reasons
        finally:
            await engine.close()
        assert bool(reasons) == lost, reasons

    async def main():
        engine = await asyncio.to_thread(open_engine, EngineSettings(path))
        async with lives(engine) as reasons:
            result = await asyncio.wait_for(action(engine), 60)
            if lost:
                async with asyncio.timeout(20):
                    while not reasons:
                        await asyncio.sleep(0.02)
            return result

    return asyncio.run(main())


async def up_again(engine: CommandEngine) -> None:
    async with asyncio.timeout(20):
        while not engine.status().ready:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("crash", "ended with status 3"),
        ("half", "no message"),
        ("surrogate", "no message"),
        ("long", "a line of more than 65536 bytes"),
        ("many", "more than the 20 tokens"),
        ("stranger", "nobody has asked for"),
        ("noise", "no message"),
        ("hang", "no sign of life"),
    ],
)
def test_a_runtime_that_misbehaves_is_started_again(tmp_path, word, why):
    limits = f"line_bytes = 65536\nsilence_seconds = {4 if word == 'hang' else 60}"  # a busy PC is silent, too
    path = described(tmp_path, restart=QUICK, limits=limits)

    async def ask(engine: CommandEngine):
        first = engine._link.pid
        with pytest.raises(ProgramFailed, match=why):
            async for event in engine.generate(asked(word, max_tokens=20)):
                assert isinstance(event, Token)
        await up_again(engine)
        assert engine._link.pid != first and not psutil.pid_exists(first)
        return await whole(engine, asked("well", max_tokens=3))

    assert use(path, ask).usage.completion_tokens == 3


def test_silence_in_an_answer_ends_it_and_no_other(tmp_path):
    path = described(tmp_path, limits="token_seconds = 3\ncancel_seconds = 30")

    async def ask(engine: CommandEngine):
        other = asyncio.create_task(whole(engine, asked("well", max_tokens=40)))
        engine._limits = engine._limits.model_copy(update={"cancel_seconds": 0.3})
        with pytest.raises(ProgramFailed, match="said nothing of this answer for 3 s"):
            await whole(engine, asked("mute"))
        return await asyncio.gather(other, return_exceptions=True)

    (other,) = use(path, ask)
    assert other.usage.completion_tokens == 40


def test_a_runtime_that_ignores_cancel_is_ended(tmp_path):
    path = described(tmp_path, limits="cancel_seconds = 0.2", restart=QUICK)

    async def ask(engine: CommandEngine):
        generation = engine.generate(asked("deaf"))
        await anext(generation)
        began = time.monotonic()
        await generation.aclose()
        assert time.monotonic() - began < 20
        await up_again(engine)
        return await whole(engine, asked("well", max_tokens=3))

    assert use(path, ask).usage.completion_tokens == 3


def test_one_that_never_gets_better_is_given_up(tmp_path):
    path = described(tmp_path, restart="attempts = 2\nfirst_wait_seconds = 0.05")

    async def ask(engine: CommandEngine):
        for _ in range(3):
            await up_again(engine)
            with pytest.raises(ProgramFailed):
                await whole(engine, asked("crash"))
        with pytest.raises(ProgramUnavailable, match="not running"):
            await whole(engine, asked("well"))

    use(path, ask, lost=True)


def test_its_standard_error_is_logged_at_a_bounded_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO, "petals_win")
    use(described(tmp_path), lambda engine: whole(engine, asked("stderr please", max_tokens=2)))
    lines = [record.getMessage() for record in caplog.records if ": line " in record.getMessage()]
    assert 0 < len(lines) < 300 and max(map(len, lines)) < 700


def test_its_own_words_reach_the_asker(tmp_path):
    async def ask(engine: CommandEngine):
        with pytest.raises(UserError, match="^I do not like this.$"):
            await whole(engine, asked("refuse this"))

    use(described(tmp_path), ask)


def test_what_it_cannot_do_is_refused_unless_the_file_allows_it(tmp_path):
    async def ask(engine: CommandEngine):
        for name, value in {"top_k": 5, "frequency_penalty": 0.5, "min_p": 0.1, "logit_bias": {5: 1.0}}.items():
            with pytest.raises(UserError, match=f"^{name}: words cannot do that"):
                await whole(engine, asked("well", **{name: value}))
        return await whole(engine, asked("well", max_tokens=2, top_k=0, top_p=1, min_tokens=2, repetition_penalty=1))

    assert use(described(tmp_path), ask).usage.completion_tokens == 2
    allowed = described(tmp_path, 'ignore = ["top_k"]')
    assert use(allowed, lambda engine: whole(engine, asked("well", max_tokens=2, top_k=5))).text


def test_a_version_that_nobody_speaks(tmp_path):
    path = described(tmp_path, environment='WORDS_VERSION = "7"')
    with pytest.raises(UserError, match="speaks version 7 of the protocol, and petals-win speaks 1"):
        open_engine(EngineSettings(path))


def test_a_model_that_cannot_be_loaded(tmp_path):
    path = described(tmp_path, models='[[models]]\nname = "words"\nsettings = { missing = true }\n')
    with pytest.raises(UserError, match="it says: there is no such file"):
        open_engine(EngineSettings(path))


def test_one_that_says_nothing_at_the_start(tmp_path):
    path = tmp_path / "silent.toml"
    (tmp_path / "silent.py").write_text("import time; time.sleep(600)")
    path.write_text(
        f"program = {json.dumps(sys.executable)}\narguments = ['silent.py']\n[[models]]\nname = 'm'\n"
        "[limits]\nstart_seconds = 0.5\n"
    )
    with pytest.raises(UserError, match="did not answer within 0.5 s"):
        open_engine(EngineSettings(str(path)))


def test_secrets_of_ours_stay_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PETALS_WIN_API_KEYS", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("KEPT", "yes")
    (tmp_path / "key.txt").write_text("its own\n")
    env = read_description(described(tmp_path, environment_files='ITS_KEY = "key.txt"')).env()
    assert "secret" not in env.values() and env["KEPT"] == "yes" and env["ITS_KEY"] == "its own"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("program = 3", "program: "),
        ("programm = 'x'\nprogram = 'x'\n[[models]]\nname = 'm'", "programm: "),
        ("program = 'x'", "models: "),
        ("program = 'x'\nfolder = 'nowhere'\n[[models]]\nname = 'm'", "there is no folder"),
        ("program = 'x'\n[[models]]\nname = 'm'\n[[models]]\nname = 'M'", "two models have the same name"),
        ("program = [", "no TOML file"),
    ],
)
def test_a_description_that_makes_no_sense(tmp_path, text, why):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=why):
        read_description(str(tmp_path / "bad.toml"))


def test_a_program_that_is_not_there(tmp_path):
    (tmp_path / "bad.toml").write_text("program = 'no-such-program'\n[[models]]\nname = 'm'")
    with pytest.raises(UserError, match="There is no program 'no-such-program'"):
        open_engine(EngineSettings(str(tmp_path / "bad.toml")))
    with pytest.raises(UserError, match="cannot be read"):
        open_engine(EngineSettings(str(tmp_path / "none.toml")))


def test_messages_that_are_none_are_not_repeated():
    for line in (
        b"secret",
        b"{}",
        b'{"type": "secret"}',
        b'{"type": "token", "id": 5, "text": "secret"}',
        b"[" * 9999,
    ):
        with pytest.raises(Violation) as caught:
            read_message(line)
        assert "secret" not in str(caught.value)
