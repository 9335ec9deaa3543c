"""Models from the hub: downloads of single files, and a sentence for everything that can go wrong there."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_chat import tiny_chat_model
from typer.testing import CliRunner

from models.hub import TOKEN, Hub, running_hub
from petals_win.cli.main import app
from petals_win.errors import UserError
from petals_win.models.checkpoint import INDEX
from petals_win.models.source import open_model
from petals_win.span.span import Span

MODEL = "someone/small-llama"


@pytest.fixture
def hub(checkpoint):
    folder = checkpoint("llama", shard_size=30_000)
    with running_hub() as hub:
        hub.models[MODEL] = {file.name: file.read_bytes() for file in folder.iterdir()}
        yield hub


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variable HF_ENDPOINT does, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def load(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opens a model of the test's hub and loads a span; tells what a user would see."""
    point_to(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def load(name: str = MODEL, start: int = 0, end: int = 1, token=None, revision=None) -> str:
        try:
            source = open_model(name, token=token, revision=revision, cache_dir=str(tmp_path / "hub"))
            span = Span.load(source, start, end)
        except UserError as e:
            return f"REFUSED {e}"
        assert span.weight_bytes > 0
        return f"LOADED {source.name}"

    return load


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the five tries of the hub's client."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def fetched(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}


def test_only_the_shards_that_are_needed_are_fetched(hub, load, monkeypatch):
    assert load(start=1, end=2).startswith("LOADED small-llama")
    weight_map = json.loads(hub.models[MODEL][INDEX])["weight_map"]
    needed = {file for key, file in weight_map.items() if ".layers.1." in key}
    assert {name for name in fetched(hub) if name.endswith(".safetensors")} == needed
    assert needed < set(weight_map.values())

    hub.requests.clear()
    assert load(start=1, end=2).startswith("LOADED")
    assert not {name for name in fetched(hub) if name.endswith(".safetensors")}, "they are kept"
    hub.models.clear()  # and nothing else is asked for where there is no network
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(start=1, end=2).startswith("LOADED")
    assert load(start=0, end=4).startswith(
        "REFUSED The Hugging Face hub cannot be reached, and someone/small-llama is not complete"
    )


def test_what_arrives_damaged_is_not_kept(hub, load):
    weight_map = json.loads(hub.models[MODEL][INDEX])["weight_map"]
    shard = weight_map["model.layers.0.mlp.up_proj.weight"]
    hub.damaged.add(shard)
    said = load()
    assert said.startswith(f"REFUSED The file {shard} of {MODEL} arrived damaged, and was deleted. Run the same")
    hub.damaged.clear()
    assert load().startswith("LOADED"), "it is fetched anew"


@pytest.fixture
def pulled(hub, load, tmp_path, monkeypatch):
    """Runs `petals-win pull`; gives what it prints as JSON."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for file in tiny_chat_model(tmp_path / "small", context=64).glob("*token*"):
        hub.models[MODEL][file.name] = file.read_bytes()

    def pull(*arguments: str) -> dict:
        result = CliRunner().invoke(app, ["pull", MODEL, "--json", *arguments])
        if result.exception is not None:
            raise result.exception
        return json.loads(result.stdout)

    return pull


def test_pull(hub, load, pulled, monkeypatch):
    weight_map = json.loads(hub.models[MODEL][INDEX])["weight_map"]
    needed = {file for key, file in weight_map.items() if ".layers.1." in key}
    told = pulled("--blocks", "1:2")
    assert {file for file in told["files"] if file.endswith(".safetensors")} == needed
    assert told["bytes"] > sum(len(hub.models[MODEL][file]) for file in needed) and told["model"] == "small-llama"
    assert {"tokenizer.json", "tokenizer_config.json"} <= fetched(hub)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load(start=1, end=2).startswith("LOADED")
        assert load(start=0, end=4).startswith("REFUSED")

    hub.requests.clear()
    assert set(weight_map.values()) <= set(pulled()["files"])
    assert not needed & fetched(hub), "what was here is not fetched again"
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load(start=0, end=4).startswith("LOADED")


def test_pull_goes_on_where_it_was_broken_off(hub, pulled, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    shard = sorted(set(json.loads(hub.models[MODEL][INDEX])["weight_map"].values()))[0]
    hub.break_off[shard] = len(hub.models[MODEL][shard]) // 2
    assert shard in pulled()["files"]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(shard)]
    assert len(ranges) == 2 and ranges[0] is None and ranges[1] is not None


def test_pull_of_blocks_that_there_are_not(pulled):
    with pytest.raises(UserError, match="blocks 3:9 are out of range: the model has the blocks 0:4"):
        pulled("--blocks", "3:9")


def test_a_gated_model(hub, load):
    hub.gated.add(MODEL)
    said = load()
    assert said.startswith(f"REFUSED The model {MODEL} is gated: ")
    assert "--token-file" in said and "HF_TOKEN" in said
    assert TOKEN not in said
    assert load(token=TOKEN).startswith("LOADED")


def test_a_token_from_the_environment(hub, load, monkeypatch):
    hub.gated.add(MODEL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load().startswith("LOADED")


@pytest.mark.parametrize("status", [401, 403])
def test_the_hub_refuses(hub, load, status):
    hub.failing[MODEL] = status
    said = load(token=TOKEN)
    assert said.startswith("REFUSED ") and MODEL in said
    assert "token" in said and TOKEN not in said


@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "token"])
def test_an_unknown_model(load, token):
    said = load("someone/no-such-model", token=token)
    assert said.startswith("REFUSED There is no model 'someone/no-such-model' on the Hugging Face hub")
    assert "spelling" in said


@pytest.mark.parametrize("name", ["no spaces please/model", "a/b/c", "--help"])
def test_a_name_that_cannot_be(load, name):
    assert load(name).startswith("REFUSED There is no model")


def test_an_unknown_revision(load):
    assert load(revision="v99").startswith(f"REFUSED The model {MODEL} has no revision 'v99'")


def test_nothing_listens_there(load, monkeypatch, no_pauses):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    point_to(nobody, monkeypatch)
    said = load()
    assert said.startswith("REFUSED The Hugging Face hub cannot be reached") and "internet connection" in said


def test_the_hub_is_out_of_order(hub, load, no_pauses):
    hub.failing[MODEL] = 500
    said = load()
    assert said.startswith("REFUSED The Hugging Face hub") and "500" in said


def test_no_model_for_transformers(hub, load):
    del hub.models[MODEL]["config.json"]
    assert load().startswith(f"REFUSED {MODEL} on the Hugging Face hub has no config.json")


def test_an_interrupted_download_goes_on_where_it_ended(hub, load, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what was received of an unfinished one is lost
    weight_map = json.loads(hub.models[MODEL][INDEX])["weight_map"]
    shard = weight_map["model.layers.0.mlp.up_proj.weight"]
    cut = len(hub.models[MODEL][shard]) // 2
    hub.break_off[shard] = cut
    assert load().startswith("LOADED")
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(shard)]
    assert len(ranges) == 2 and ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= cut
