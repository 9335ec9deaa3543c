"""The TOML file that describes a native runtime: what is started, how it is talked to, which models it has, and its limits.

Knows the file's fields and what makes no sense in them. Does not start anything.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from petals_win.engines.command_arguments import Option, check_placeholders, check_program
from petals_win.errors import UserError

_LARGEST_FILE = 2**20
# Of this process's environment, what a stranger's program is not to know.
_SECRETS = re.compile(r"PETALS_WIN_.*|HF_TOKEN|HUGGING_FACE_HUB_TOKEN|.*_API_KEYS?", re.IGNORECASE)
_SECONDS = Field(gt=0, le=86_400)

_Name = Annotated[str, StringConstraints(pattern=r"^[^\s\x00-\x1f\x7f]{1,200}$")]
# What of a request may be left out, if the file says so.
Passed = Literal[Option, "tools", "chat_template_kwargs"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Part):
    """A model of the runtime. settings: what the runtime needs to load it, sent along as it stands, or put into arguments.

    tokenizer: a folder with the model's tokenizer, where the program cannot count nor make a prompt of messages.
    """

    name: _Name
    context_length: Annotated[int, Field(ge=2, le=2**31)] | None = None
    settings: dict[str, Any] = {}
    tokenizer: Path | None = None


class Limits(_Part):
    """Seconds, unless said otherwise."""

    start_seconds: Annotated[float, _SECONDS] = 300
    first_token_seconds: Annotated[float, _SECONDS] = 300
    token_seconds: Annotated[float, _SECONDS] = 60
    silence_seconds: Annotated[float, _SECONDS] = 60
    cancel_seconds: Annotated[float, _SECONDS] = 5
    waiting_seconds: Annotated[float, _SECONDS] = 300
    at_once: Annotated[int, Field(ge=1, le=1024)] | None = None
    line_bytes: Annotated[int, Field(ge=1024, le=64 * 2**20)] = 2**20
    answer_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 16 * 2**20


# What means nothing for a program that is started for each question.
_OF_ONE_LIFE = {"start_seconds", "silence_seconds", "cancel_seconds", "line_bytes"}


class Restart(_Part):
    attempts: Annotated[int, Field(ge=0, le=1000)] = 5
    first_wait_seconds: Annotated[float, _SECONDS] = 1
    longest_wait_seconds: Annotated[float, _SECONDS] = 60


class Described(_Part):
    """A runtime. `home` is the folder of the file, from which relative paths count.

    options: of the dialect "cli", the arguments that are added where a request asks for something.
    """

    home: Path
    dialect: Literal["jsonl", "cli"] = "jsonl"
    program: Annotated[str, Field(min_length=1)]
    arguments: tuple[str, ...] = ()
    options: dict[Option, tuple[str, ...]] = {}
    folder: Path = Path(".")
    models: Annotated[tuple[Model, ...], Field(min_length=1, max_length=64)]
    environment: dict[str, str] = {}
    environment_files: dict[str, Path] = {}
    ignore: frozenset[Passed] = frozenset()
    limits: Limits = Limits()
    restart: Restart = Restart()

    @model_validator(mode="after")
    def _make_sense(self) -> Described:
        names = [model.name.lower() for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        if self.dialect == "cli":
            self._check_cli()
        elif self.options or any(model.tokenizer for model in self.models):
            raise ValueError(
                "options and tokenizer are for the dialect 'cli': a runtime that speaks 'jsonl' says itself"
            )
        return self

    def _check_cli(self) -> None:
        if self.restart.model_fields_set or (unused := self.limits.model_fields_set & _OF_ONE_LIFE):
            named = "restart" if self.restart.model_fields_set else min(unused)
            raise ValueError(f"{named} is not for the dialect 'cli', whose program is started for each question")
        for model in self.models:
            if model.context_length is None:
                raise ValueError(f"the context_length of {model.name} is missing")
            check_placeholders(self.program, self.arguments, self.options, model.settings)

    def argv(self) -> list[str]:
        """Program and arguments. Raises UserError if there is no such program, or it must not have these arguments."""
        beside = self.home / self.program
        found = str(beside) if beside.is_file() else shutil.which(self.program)
        if found is None:
            raise UserError(
                f"There is no program {self.program!r} in {self.home} or in PATH. Correct `program` in the file that describes it."
            )
        if self.dialect == "cli":  # Windows finds x.cmd where x is asked for
            try:
                check_program(found, self.arguments)
            except ValueError as e:
                raise UserError(f"{found}: {e}.") from e
        return [os.path.abspath(found), *self.arguments]

    @property
    def working_folder(self) -> Path:
        return self.home / self.folder

    def env(self) -> dict[str, str]:
        """Our own environment without secrets, and what the file says. Raises UserError for a file that cannot be read."""
        env = {name: value for name, value in os.environ.items() if not _SECRETS.fullmatch(name)}
        env |= self.environment
        for name, path in self.environment_files.items():
            try:
                env[name] = (self.home / path).read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"environment_files: {self.home / path} cannot be read: {e}.") from e
        return env

    @property
    def named(self) -> str:
        """The program, as sentences name it."""
        return f"the program {Path(self.program).name}"


def read_description(path: str) -> Described:
    """Raises UserError if it cannot be read, or for what makes no sense in it."""
    file = Path(path)
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} is too large for the description of a runtime.")
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UserError(
            f"{path} cannot be read: {e.strerror}. Give --model the TOML file that describes the runtime."
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no TOML file: {e}. docs/command-engine.md has an example.") from e
    content.pop("home", None)
    try:
        described = Described(home=file.resolve().parent, **content)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path}: {where + ': ' if where else ''}{said}. docs/command-engine.md says what there is."
        ) from e
    if not described.working_folder.is_dir():
        raise UserError(f"{path}: there is no folder {described.working_folder}.")
    return described
