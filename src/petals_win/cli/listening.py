"""The options of commands that start the API: where it listens and who may ask. Knows their names and help alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from petals_win.errors import UserError

if TYPE_CHECKING:
    from petals_win.api.settings import Settings

KEYS_VARIABLE = "PETALS_WIN_API_KEYS"
_SELF_SIGNED = "self-signed"


@dataclass(frozen=True)
class Listening:
    """What the user says of the API's address and of who may ask: one option of the command line for each field."""

    host: Annotated[str, typer.Option(help="Address to listen on; any but 127.0.0.1 needs a key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port of the API and the chat page.", min=0, max=65535)] = 8000
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with one API key a line; callers send one as a Bearer token. Changes count at once."),
    ] = None
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="Ask for the keys of 'petals-win key create'; default on other addresses than 127.0.0.1, if there are any.",
        ),
    ] = False
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others on the network in without a key.")] = False
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin whose pages may call this API, e.g. https://baremetalrt.ai.")
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which others may ask without a key, e.g. that of a proxy: llm.example.org."),
    ] = None
    root_path: Annotated[str, typer.Option(help="What a proxy has before all paths, e.g. /llm.")] = ""
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy whose X-Forwarded-For, -Proto and -Host are believed."),
    ] = None
    tls: Annotated[str | None, typer.Option(help="'self-signed': HTTPS by a certificate that is made here once.")] = (
        None
    )
    tls_cert: Annotated[Path | None, typer.Option(help="HTTPS by this certificate (PEM), with --tls-key.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Private key of --tls-cert (PEM).")] = None
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Another name of the model, for programs that ask for a certain one: gpt-4o."),
    ] = None
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Answer by the model whatever the name that is asked for.")
    ] = False
    blanks_ahead: Annotated[
        bool,
        typer.Option(
            "--blanks-ahead",
            help="Begin whole answers that take over 10 s with blanks, for a proxy that gives up on a silent server; errors after "
            "that have status 200.",
        ),
    ] = False

    def settings(self) -> Settings:
        """Raises UserError for what the options must not say together, and for files that are none."""
        from petals_win.api.created_keys import CreatedKeys
        from petals_win.api.settings import KeyFile, Settings
        from petals_win.host.addresses import is_loopback_host
        from petals_win.host.tls import Tls, self_signed

        if self.tls not in (None, _SELF_SIGNED):
            raise UserError(f"--tls {self.tls} is unknown. Give --tls {_SELF_SIGNED}, or --tls-cert and --tls-key.")
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls and self.tls_cert):
            raise UserError(f"For HTTPS give --tls-cert together with --tls-key, or --tls {_SELF_SIGNED} alone.")
        from_environment = _keys_in(os.environ.get(KEYS_VARIABLE, ""))
        said = bool(from_environment or self.api_key_file or self.insecure or is_loopback_host(self.host))
        created = CreatedKeys() if self.keys or not said else None
        if created is not None and not created.all():
            if self.keys:
                raise UserError(
                    "There is no key yet. Make one with 'petals-win key create NAME', or leave --keys out."
                )
            created = None
        tls = None
        if self.tls:
            tls = self_signed()
        elif self.tls_cert and self.tls_key:
            tls = Tls(self.tls_cert, self.tls_key)
        return Settings(
            host=self.host,
            port=self.port,
            api_keys=from_environment,
            key_file=KeyFile(self.api_key_file) if self.api_key_file else None,
            created_keys=created,
            insecure=self.insecure,
            cors_origins=tuple(self.cors_origin or ()),
            allow_hosts=tuple(self.allow_host or ()),
            root_path=self.root_path,
            trusted_proxies=tuple(self.trusted_proxy or ()),
            tls=tls,
            aliases=tuple(self.alias or ()),
            any_model=self.any_model,
            blanks_ahead=self.blanks_ahead,
        )


def with_listening(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose parameter `listen` is a Listening, the options of all its fields in that place."""
    hints = get_type_hints(Listening, include_extras=True)
    names = [field.name for field in dataclasses.fields(Listening)]
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(Listening)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters += options if parameter.name == "listen" else own

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        listen = Listening(**{name: given.pop(name) for name in names})
        command(listen=listen, **given)

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def tell_certificate(settings: Settings, tell: Callable[[str], None]) -> None:
    """Say by what the certificate of HTTPS is known, if it signs itself: whoever connects has nothing else to trust it by."""
    from petals_win.host.tls import own_names

    tls = settings.tls
    if tls is None or not tls.self_signed:
        return
    tell(f"Certificate: {tls.cert}\n    SHA-256 {tls.fingerprint}\n    for {', '.join(tls.names)}")
    if new := [name for name in own_names() if name not in tls.names]:
        tell(
            f"It does not name {', '.join(new)}: delete it, and it is made anew at the next start, with another SHA-256."
        )


def _keys_in(text: str) -> tuple[str, ...]:
    """The keys in the value of an environment variable, with commas or blanks between them. Raises UserError."""
    keys = tuple(re.split(r"[\s,]+", text.strip(" \t\r\n,"))) if text.strip(" \t\r\n,") else ()
    if not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise UserError(f"{KEYS_VARIABLE} has a key that is none: only ASCII letters, digits and signs, no commas.")
    return keys
