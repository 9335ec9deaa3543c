"""Whatever fits /openapi.json, or just does not, gets an answer that is documented there, and never one of 5xx.

schemathesis makes the requests and checks what comes back. Run by test_fuzz.py, and by scripts/fuzz-api with many more requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from tiny_chat import tiny_chat_model

from api.fake_engine import FakeEngine
from api.serving import Served, serving
from petals_win.api.app import create_app
from petals_win.api.settings import Settings
from petals_win.engines.base import Engine
from petals_win.engines.registry import EngineSettings, find_engine

EXAMPLES = int(os.environ.get("PETALS_WIN_FUZZ_EXAMPLES", "20"))
# What cannot hold here, whatever is documented:
NOT_CHECKED = [
    # No schema says which fields exclude one another, which ids a model has, how long its context is, or that a text
    # is a JSON schema or a regular expression. What is refused for it is a 400, whose form is checked.
    positive_data_acceptance,
    # What other servers read is read here, too, where it can mean one thing only: 0 for false, "5" for 5.
    negative_data_rejection,
]
WITHOUT_END = "/v1/swarm/events"


def document(coverage: bool) -> Any:
    """What schemathesis makes requests from. `coverage`: also each bound and each kind of value by a request of its own."""
    config = schemathesis.Config.from_dict(
        {
            "generation": {"deterministic": "PETALS_WIN_FUZZ_EXAMPLES" not in os.environ, "database": "none"},
            "phases": {"coverage": {"enabled": coverage}},
            "cache": {"enabled": False},
        }
    )
    # Any name of a model is taken, so that requests get further than to a 404. No engine is asked for the description.
    described = create_app(cast(Engine, None), settings=Settings(any_model=True)).openapi()
    return schemathesis.openapi.from_dict(described, config=config)


def fuzzed(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def scripted() -> Iterator[Served]:
    with serving(FakeEngine(pace=0), any_model=True) as served:
        yield served


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Served]:
    model = tiny_chat_model(tmp_path_factory.mktemp("fuzz") / "tiny", context=64, ends=40)
    engine = find_engine("local")(EngineSettings(str(model)))
    with serving(engine, any_model=True) as served:
        yield served


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def check(case: schemathesis.Case, served: Served, session: requests.Session) -> None:
    case.call_and_validate(base_url=served.url, session=session, timeout=60, excluded_checks=NOT_CHECKED)


@document(coverage=True).exclude(path=WITHOUT_END).parametrize()
@fuzzed(EXAMPLES)
def test_a_scripted_engine(case, scripted, session):
    check(case, scripted, session)


def test_events_that_end_with_the_server(session):
    case = document(coverage=False)[WITHOUT_END]["GET"].Case()
    with serving() as served:
        threading.Timer(1, served.api.stop).start()
        check(case, served, session)


@document(coverage=False).exclude(path=WITHOUT_END).parametrize()
@fuzzed(20)
def test_a_real_engine(case, real, session):
    check(case, real, session)
