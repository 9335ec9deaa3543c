"""Petals' RPCs with a stream of requests that is made up, and no network: order, steps that come twice, refusals, ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import petals
import pytest
import torch
from hivemind import MSGPackSerializer, PeerID, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.compression import deserialize_tensor_stream
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import split_for_streaming
from petals.server.handler import TransformerConnectionHandler as UnderUpstreamsName
from petals.utils.packaging import pack_args_kwargs

from petals_win.errors import NodeFull, NodeRefused, node_error
from petals_win.models.source import open_model
from petals_win.node import inbox, served
from petals_win.node.petals_rpc import SESSION_TOKENS, Deadlines, Served, TransformerConnectionHandler
from petals_win.node.service import BlockService
from petals_win.span.chunks import Chunks
from petals_win.span.span import Span
from petals_win.swarm.protocol import CACHED_PAGES, OUTPUTS, PETALS, PROTOCOL, TAKES_BACK

CONTEXT = SimpleNamespace(remote_id="12D3KooWstranger")
PEER = PeerID.from_base58("QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY")
NONE, NO_IDS = torch.empty(0), torch.empty(0, dtype=torch.int64)
MIB = 2**20


@pytest.fixture(scope="module")
def span(checkpoint) -> Span:
    return Span.load(open_model(str(checkpoint("llama"))), 0, 4)


def rpc_of(service: BlockService, **deadlines: float) -> TransformerConnectionHandler:
    rpc = TransformerConnectionHandler(service, Served("tiny-hf", "llama-0", PETALS, 0, 4), Deadlines(**deadlines))
    rpc._dht = SimpleNamespace(client_mode=False)
    return rpc


@pytest.fixture
def rpc(service) -> TransformerConnectionHandler:
    return rpc_of(service)


def uid(start: int = 0, end: int = 4, name: str = "tiny-hf") -> str:
    return " ".join(f"{name}.{block}" for block in range(start, end))


def request(*tensors: torch.Tensor, blocks: str = uid(), **metadata: Any) -> Any:
    flat, structure = pack_args_kwargs(*tensors)
    metadata = {"args_structure": structure, **metadata} if tensors else metadata
    return runtime_pb2.ExpertRequest(
        uid=blocks, tensors=[serialize_torch_tensor(each) for each in flat], metadata=MSGPackSerializer.dumps(metadata)
    )


def step(hidden: torch.Tensor, prompts: torch.Tensor = NONE, hypo_ids: torch.Tensor = NO_IDS, **metadata: Any) -> Any:
    return request(hidden, prompts, hypo_ids, **{"max_length": 100, **metadata})


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Client:
    """A client's stream of requests, which it can add to and end."""

    def __init__(self, *requests: Any):
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        for each in requests:
            self._queue.put_nowait(each)

    def send(self, *requests: Any) -> None:
        for each in requests:
            self._queue.put_nowait(each)

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (each := await self._queue.get()) is not None:
            yield each


def answers(rpc: TransformerConnectionHandler, client: Client) -> AsyncIterator[Any]:
    return rpc.rpc_inference(client.__aiter__(), CONTEXT)  # type: ignore[arg-type]


def tensor_of(answer: Any) -> torch.Tensor:
    (tensor,) = answer.tensors
    return deserialize_torch_tensor(tensor)


async def freed(service: BlockService, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while service.budget.bytes_left < service.budget.total_bytes:
            await asyncio.sleep(0.01)


def run(coroutine, seconds: float = 30):
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def test_the_names_on_the_wire_are_upstream_s():
    assert UnderUpstreamsName is TransformerConnectionHandler
    named = {"info", "forward", "forward_stream", "backward", "backward_stream", "inference", "push"}
    TransformerConnectionHandler._collect_rpc_handlers()
    handlers = {each.method_name: each for each in TransformerConnectionHandler._rpc_handlers}
    assert handlers.keys() == {f"rpc_{name}" for name in named}
    get_name = TransformerConnectionHandler._get_handle_name
    assert get_name(None, "rpc_inference") == "TransformerConnectionHandler.rpc_inference"
    streams = {name for name, each in handlers.items() if each.stream_output}
    assert streams == {"rpc_forward_stream", "rpc_backward_stream", "rpc_inference"}
    assert PETALS == petals.__version__


def test_what_a_node_tells_about_itself(rpc, service):
    async def ask(block: str) -> dict:
        return MSGPackSerializer.loads((await rpc.rpc_info(runtime_pb2.ExpertUID(uid=block), CONTEXT)).serialized_info)

    about = run(ask("tiny-hf.2"))
    assert about == run(ask("llama-0.2")) and about["protocol"] == PROTOCOL and about["content_id"] == "llama-0"
    assert about["version"] == PETALS and about["dht_client_mode"] is False and about[SESSION_TOKENS] == 512
    assert about["cache_tokens_available"] == 8 * MIB // service.span.block_cache_bytes_per_token
    (hidden,), named = about["forward_schema"]
    assert (hidden.shape[-1], hidden.dtype, named) == (64, torch.float32, {})
    assert len(about["inference_schema"][0]) == 3 and about["outputs_schema"] == (hidden,)
    assert about.keys() - run(ask("")).keys() == {SESSION_TOKENS, "forward_schema", "outputs_schema"} | {
        "keyword_names",
        "inference_schema",
    }
    with pytest.raises(ValueError, match="does not serve tiny-hf.7"):
        run(ask("tiny-hf.7"))


def test_answers_come_in_the_order_of_the_requests(rpc, service, span):
    hidden = states(2, 12, 64)
    wanted = span.forward(hidden, 1, 3)
    where = {"blocks": uid(1, 3, "llama-0")}

    async def ask():
        client = Client(*(step(piece, **where) for piece in hidden.split([7, 1, 1, 3], dim=1)))
        client.end()
        got = [tensor_of(answer) async for answer in answers(rpc, client)]
        await freed(service)
        return got

    got = run(ask())
    assert [piece.shape[1] for piece in got] == [7, 1, 1, 3]
    assert torch.allclose(torch.cat(got, dim=1), wanted, atol=1e-5)


def test_beams_and_deep_prompts(rpc, span):
    hidden, prompts, beams = states(2, 3, 64), states(4, 1, 2, 64, seed=1), torch.tensor([1, 0])

    async def ask():
        client = Client(step(hidden, prompts), step(hidden[:, :1], hypo_ids=beams), request())
        return [tensor_of(answer) async for answer in answers(rpc, client)]

    session = span.open(2, 100)
    first = span.step(session, hidden, prompts=list(prompts))
    assert torch.allclose(torch.stack(list(run(ask())[0])), first, atol=1e-5)
    second = span.step(session, hidden[:, :1], hypo_ids=beams)
    assert torch.allclose(run(ask())[1], second, atol=1e-5)


def test_tokens_are_taken_back(rpc, service, span):
    """By Petals' own word for it, which pushed steps bring along, too; and the node tells that it heeds it."""
    hidden = states(2, 9, 64)
    wanted = span.forward(hidden, 0, 4)

    async def ask():
        client = Client(step(hidden[:, :5], session_id="a"))
        stream = answers(rpc, client)
        first = await anext(stream)
        assert MSGPackSerializer.loads(first.metadata) == {TAKES_BACK: 100}
        client.send(step(-hidden[:, :4]), step(hidden[:, 4:5], start_from_position=4, step_id="2"))
        got = [tensor_of(await anext(stream)) for _ in range(2)]
        await rpc.rpc_push(step(hidden[:, 3:8], session_id="a", start_from_position=3), CONTEXT)
        answer = await anext(stream)
        assert answer.metadata == b""
        client.send(step(hidden[:, 8:], start_from_position=8))
        client.end()
        return [got[1], tensor_of(answer), tensor_of(await anext(stream))]

    fifth, middle, last = run(ask())
    assert torch.allclose(fifth, wanted[:, 4:5], atol=1e-5)
    assert torch.allclose(torch.cat([middle, last], dim=1), wanted[:, 3:], atol=1e-5)


def test_what_a_session_has_left_is_found_by_its_owner_alone(rpc, service, span):
    hidden, pages = states(1, 200, 64), [bytes([page] * 16) for page in range(3)]
    wanted = span.step(span.open(1, 300), hidden)
    theirs = SimpleNamespace(remote_id="12D3KooWanother")

    async def leave():
        client = Client(step(hidden, max_length=300), request(pages=pages))
        assert len([answer async for answer in answers(rpc, client)]) == 1
        await freed(service)

    async def find(asked: list[bytes], context=CONTEXT) -> int:
        client = Client(step(hidden[:, :0], max_length=300, pages=asked))
        stream = rpc.rpc_inference(client.__aiter__(), context)  # type: ignore[arg-type]
        first = await anext(stream)
        assert tensor_of(first).shape == (1, 0, 64)
        found = MSGPackSerializer.loads(first.metadata)[CACHED_PAGES]
        client.send(step(hidden[:, 64 * found :]))
        client.end()
        answer = tensor_of(await anext(stream))
        assert torch.allclose(answer, wanted[:, 64 * found :], atol=1e-5)
        async for _ in stream:
            raise AssertionError
        await freed(service)
        return found

    async def ask():
        assert await find(pages) == 0
        await leave()
        assert service._prefixes.nbytes > 0
        asked = (pages, [*pages[:2], bytes(17)], pages[1:], [bytes(16)])
        found = [await find(each) for each in asked]
        return found, await find(pages, theirs)

    assert run(ask()) == ([3, 2, 0, 1], 0)


def test_what_a_session_has_left_is_there_when_its_client_learns_of_the_end(rpc, service, monkeypatch):
    leave = served._leave

    def slowly(*args):
        time.sleep(0.3)
        return leave(*args)

    monkeypatch.setattr(served, "_leave", slowly)

    async def ask():
        client = Client(step(states(1, 100, 64), max_length=300), request(pages=[bytes(16)]))
        assert len([answer async for answer in answers(rpc, client)]) == 1
        return service._prefixes.nbytes, service.budget.bytes_left

    kept, left = run(ask())
    assert kept > 0 and left == service.budget.total_bytes


@pytest.mark.parametrize(
    "pages", [[b"x"], [b"x" * 65], ["x" * 16], b"x" * 16, {"a": 1}, [b"x" * 16] * 5, [b"x" * 16] * 2, 7]
)
def test_pages_that_cannot_be(rpc, service, pages):
    async def ask():
        for client in (
            Client(step(states(1, 0, 64), max_length=300, pages=pages)),
            Client(step(states(1, 1, 64), max_length=300), request(pages=pages)),
        ):
            with pytest.raises(NodeRefused, match="pages of a session"):
                async for _ in answers(rpc, client):
                    pass
        await freed(service)

    run(ask())


@pytest.mark.parametrize("start", [6, -1, 10**15, "1", 1.0, True, [1]])
def test_tokens_that_cannot_be_kept(rpc, service, start):
    async def ask():
        client = Client(step(states(1, 5, 64)), step(states(1, 1, 64), start_from_position=start))
        stream = answers(rpc, client)
        await anext(stream)
        with pytest.raises(NodeRefused, match="cannot be kept|number of tokens"):
            await anext(stream)
        await freed(service)

    run(ask())


def test_a_step_that_is_pushed_and_asked_for_is_made_once(rpc, span):
    hidden = states(1, 3, 64)
    wanted = span.forward(hidden, 0, 4)

    async def ask():
        client = Client(step(hidden[:, :1], session_id="a", step_id="1"))
        stream = answers(rpc, client)
        got = [tensor_of(await anext(stream))]
        # The push is first at the second step, the client at the third.
        await rpc.rpc_push(step(hidden[:, 1:2], session_id="a", step_id="2", pushed=True), CONTEXT)
        got.append(tensor_of(await anext(stream)))
        client.send(step(hidden[:, 1:2], step_id="2"), step(hidden[:, 2:], step_id="3"))
        got.append(tensor_of(await anext(stream)))
        await rpc.rpc_push(step(hidden[:, 2:], session_id="a", step_id="3", pushed=True), CONTEXT)
        client.end()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert rpc._inboxes == {}
        await rpc.rpc_push(step(hidden, session_id="a", step_id="4"), CONTEXT)  # late: nobody minds
        return torch.cat(got, dim=1)

    assert torch.allclose(run(ask()), wanted, atol=1e-5)


def test_pushes_beyond_measure_are_dropped_and_the_client_s_own_requests_make_good_for_them(rpc, span):
    hidden = states(1, 4, 64)

    async def ask():
        client = Client(step(hidden[:, :1], session_id="a", step_id="1"))
        stream = answers(rpc, client)
        await anext(stream)
        for _ in range(10 * inbox._MOST_AHEAD):
            await rpc.rpc_push(step(hidden[:, 1:2], session_id="a", step_id="2"), CONTEXT)
        assert rpc._inboxes["a"]._waiting.qsize() == inbox._MOST_AHEAD
        client.send(step(hidden[:, 1:2], step_id="2"), step(hidden[:, 2:], step_id="3"))
        client.end()
        return torch.cat([tensor_of(answer) async for answer in stream], dim=1)

    assert torch.allclose(run(ask()), span.forward(hidden, 0, 4)[:, 1:], atol=1e-5)


def test_an_id_of_a_session_is_not_taken_from_its_owner(rpc, service):
    async def ask():
        client, thief = Client(step(states(1, 1, 64), session_id="a")), Client(step(states(1, 1, 64), session_id="a"))
        stream = answers(rpc, client)
        await anext(stream)
        with pytest.raises(ValueError, match="open already"):
            await anext(answers(rpc, thief))
        assert "a" in rpc._inboxes
        client.end()
        assert [answer async for answer in stream] == []
        await freed(service)

    run(ask())


class NextServer:
    """In the place of the stub of a peer."""

    def __init__(self, delays: list[float]):
        self.delays, self.got = delays, []

    async def rpc_push(self, pushed: Any, timeout: float) -> None:
        await asyncio.sleep(self.delays.pop(0))
        self.got.append(pushed)


def test_outputs_are_pushed_on_in_order_with_all_that_came_along(rpc, service, monkeypatch):
    next_server = NextServer([0.05, 0.0])
    asked = []
    monkeypatch.setattr(rpc, "_stub_of", lambda peer: asked.append(peer) or next_server)
    after = [(PEER.to_base58(), "b", 4, 6), ("peer of the last", "c", 6, 8)]

    async def ask():
        client = Client(
            step(states(1, 2, 64), session_id="a", step_id="1"),
            step(states(1, 1, 64), hypo_ids=torch.tensor([0]), session_id="a", step_id="2", next_servers=after),
            step(states(1, 1, 64), session_id="a", step_id="3", next_servers=after),
            step(states(1, 1, 64), session_id="a", step_id="4", next_servers=[(PEER.to_base58(), "b", 4, 10**12)]),
        )
        stream = answers(rpc, client)
        got = [tensor_of(await anext(stream)) for _ in range(4)]
        async with asyncio.timeout(30):
            while len(next_server.got) < 2:
                await asyncio.sleep(0.01)
        client.end()
        assert [answer async for answer in stream] == []
        return got

    _, *got = run(ask())
    assert asked == [PEER, PEER]
    for number, pushed in enumerate(next_server.got):
        about = MSGPackSerializer.loads(pushed.metadata)
        assert pushed.uid == "tiny-hf.4 tiny-hf.5" and about["pushed"] is True
        assert (about["session_id"], about["step_id"]) == ("b", f"{number + 2}")
        assert [list(server) for server in about["next_servers"]] == [list(after[1])]
        assert torch.equal(deserialize_torch_tensor(pushed.tensors[0]), got[number])
    assert deserialize_torch_tensor(next_server.got[0].tensors[2]).tolist() == [0]


def test_of_the_outputs_only_those_are_sent_that_are_wanted(rpc, span, monkeypatch):
    """A number for another session is not for this one, and the next server gets all."""
    hidden, next_server = states(2, 60, 64), NextServer([0.0])
    monkeypatch.setattr(rpc, "_stub_of", lambda peer: next_server)
    wanted = span.step(span.open(2, 100), hidden)
    numbers = [{"a": 0}, {"a": 1, "b": 7}, {"b": 1}, {"a": 10}, {"a": 2, "b": 3}, None]

    async def ask():
        client = Client()
        for number, counts in enumerate(numbers):
            more = {} if counts is None else {OUTPUTS: counts}
            more |= {"next_servers": [(PEER.to_base58(), "b", 4, 6)]} if number == 4 else {}
            client.send(step(hidden[:, 10 * number :][:, :10], session_id="a", step_id=f"{number}", **more))
        client.end()
        return [answer async for answer in answers(rpc, client)]

    got = run(ask())
    for number, (answer, count) in enumerate(zip(got, (0, 1, 10, 10, 2, 10), strict=True)):
        output = tensor_of(answer)
        assert output.shape == (2, count, 64)
        assert torch.allclose(output, wanted[:, : 10 * number + 10][:, 10 * number + 10 - count :], atol=1e-5)
    assert got[0].ByteSize() < 100 < 10 * 2 * 64 * 4 < got[2].ByteSize()
    (pushed,) = next_server.got
    assert torch.allclose(deserialize_torch_tensor(pushed.tensors[0]), wanted[:, 40:50], atol=1e-5)
    about = MSGPackSerializer.loads(pushed.metadata)
    assert (about["session_id"], about[OUTPUTS]) == ("b", {"a": 2, "b": 3})


@pytest.mark.parametrize(
    "counts", [{"a": 6}, {"a": -1}, {"a": 10**15}, {"a": "1"}, {"a": 1.0}, {"a": True}, [1], 1, "a"]
)
def test_outputs_that_cannot_be_wanted(rpc, service, counts):
    async def ask():
        with pytest.raises(NodeRefused, match=f"{OUTPUTS} of a step"):
            await anext(answers(rpc, Client(step(states(1, 5, 64), session_id="a", **{OUTPUTS: counts}))))
        await freed(service)

    run(ask())


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (step(states(1, 1, 63)), "1, tokens, 64"),
        (step(states(1, 64)), "1, tokens, 64"),
        (step(states(1, 101, 64)), "opened for 100 tokens"),
        (step(states(1, 1, 64), max_length=-3), "at least one sequence"),
        (step(states(1, 1, 64), max_length="many"), "max_length"),
        (step(states(1, 1, 64), alloc_timeout=float("nan")), "alloc_timeout"),
        (step(states(1, 1, 64), states(3, 1, 1, 64)), "4 blocks were asked for"),
        (step(states(1, 1, 64), hypo_ids=torch.tensor([1])), "rows of the session"),
        (step(states(1, 1, 64), args_structure=[[b"__T7"], {}]), "args_structure"),
        (step(states(1, 1, 64), args_structure=3), "args_structure"),
        (step(states(1, 1, 64), active_adapter=3), "adapter"),
        (step(states(1, 1, 64), blocks=f"{uid(0, 1)} {uid(2, 3)}"), "follow one another"),
        (runtime_pb2.ExpertRequest(uid=uid(), tensors=step(states(1, 1, 64)).tensors, metadata=b"\xc1"), "metadata"),
    ],
)
def test_what_no_node_would_do_is_refused_with_the_mark_that_clients_look_for(rpc, service, first, why):
    async def ask():
        with pytest.raises(NodeRefused, match=why) as refused:
            await anext(answers(rpc, Client(first)))
        assert isinstance(node_error(str(refused.value)), NodeRefused)
        await freed(service)
        assert rpc._inboxes == {}

    run(ask())


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (step(states(1, 1, 64), blocks=uid(3, 5)), "does not serve tiny-hf.4"),
        (step(states(1, 1, 64), active_adapter="pirate"), "no adapter"),
        (step(states(1, 1, 64), protocol=PROTOCOL + 1), "Update petals-win on this PC"),
    ],
)
def test_what_another_node_may_do_is_a_failure_here(rpc, first, why):
    async def ask():
        with pytest.raises(ValueError, match=why) as failed:
            await anext(answers(rpc, Client(first)))
        assert node_error(str(failed.value)) is None

    run(ask())


def test_bytes_that_are_no_tensor_never_become_one(rpc):
    huge = step(states(1, 1, 64))
    huge.tensors[0].size[:] = [1, 2**31 - 1, 64]
    torn = step(states(1, 2, 64))
    torn.tensors[0].size[:] = [1, 3, 64]
    for first in (huge, torn):
        with pytest.raises(NodeRefused):
            run(anext(answers(rpc, Client(first))))


def test_a_full_node_says_so_after_the_client_s_patience(rpc, service):
    service.budget.total_bytes = 300 * service.span.cache_bytes_per_token

    async def ask():
        client = Client(step(states(1, 1, 64), max_length=300))
        stream = answers(rpc, client)
        await anext(stream)
        with pytest.raises(NodeFull):
            await anext(answers(rpc, Client(step(states(1, 1, 64), max_length=300, alloc_timeout=0.05))))
        client.end()
        assert [answer async for answer in stream] == []
        await freed(service)

    run(ask())


def test_a_client_that_goes_away_in_the_middle_of_a_step_frees_its_session(rpc, service, compute):
    gate = threading.Event()

    async def ask():
        client = Client(step(states(1, 1, 64), session_id="a"))
        stream = answers(rpc, client)
        await anext(stream)
        compute.submit(gate.wait, 10)
        client.send(step(states(1, 50, 64)))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert rpc._inboxes == {}
        gate.set()
        await freed(service)

    run(ask())


def test_a_client_that_goes_away_in_the_middle_of_a_prefill_frees_its_session(rpc, service, span, monkeypatch):
    service._scheduler._chunks = Chunks(20)
    advance, chunks, given_up = span.advance, [], threading.Event()

    def slowly(pieces):
        if sum(chunks, []).count(1) == 3:  # the other one's steps are done
            given_up.wait(20)
        chunks.append([tokens for _, tokens in pieces])
        time.sleep(0.05)
        return advance(pieces)

    monkeypatch.setattr(span, "advance", slowly)

    async def ask():
        prefill = asyncio.ensure_future(anext(answers(rpc, Client(step(states(1, 500, 64), max_length=500)))))
        other = Client(*(step(states(1, 1, 64)) for _ in range(3)))
        other.end()
        while not chunks:
            await asyncio.sleep(0.01)
        assert len([answer async for answer in answers(rpc, other)]) == 3
        prefill.cancel()
        await asyncio.sleep(0)
        given_up.set()
        await asyncio.gather(prefill, return_exceptions=True)
        await freed(service)

    run(ask())
    assert any(
        len(pieces) == 2 and min(pieces) == 1 for pieces in chunks
    ), f"the other one goes along with chunks: {chunks}"
    assert sum(sum(pieces) for pieces in chunks) < 400, "it was given up in the middle"


def test_a_client_that_goes_away_between_two_steps_frees_its_session(rpc, service):
    async def ask():
        stream = answers(rpc, Client(step(states(1, 1, 64), session_id="a")))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await freed(service)
        assert rpc._inboxes == {}

    run(ask())


@pytest.mark.parametrize("which", ["step", "session"])
def test_a_session_that_nobody_goes_on_with_ends(service, which):
    rpc = rpc_of(service, **{which: 0.5})

    async def ask():
        assert len([answer async for answer in answers(rpc, Client(step(states(1, 1, 64))))]) == 1
        await freed(service)
        if which == "step":
            assert [answer async for answer in answers(rpc, Client())] == []

    run(ask())


async def streamed(call: Any, asked: Any, piece: int = 200) -> list[torch.Tensor]:
    """The tensors of a call whose request, and answer, come in pieces."""

    async def parts() -> AsyncIterator[Any]:
        for tensor in asked.tensors:
            for part in split_for_streaming(tensor, piece):
                yield runtime_pb2.ExpertRequest(uid=asked.uid, tensors=[part], metadata=asked.metadata)

    return await deserialize_tensor_stream(message.tensors async for message in call(parts(), CONTEXT))


def test_forward_and_backward_whole_and_in_pieces(rpc, span):
    hidden, grads, prompts = states(2, 5, 64), states(2, 5, 64, seed=1), states(2, 2, 1, 64, seed=2)
    where = {"blocks": uid(1, 3)}
    wanted = span.forward(hidden, 1, 3, prompts=list(prompts))
    grad, grad_prompts = span.backward(hidden, grads, 1, 3, prompts=list(prompts))

    async def ask():
        forward, backward = request(hidden, prompts, **where), request(hidden, grads, prompts, **where)
        whole = await rpc.rpc_forward(forward, CONTEXT), await rpc.rpc_backward(backward, CONTEXT)
        outputs, gradients = ([deserialize_torch_tensor(each) for each in answer.tensors] for answer in whole)
        return (
            (outputs, await streamed(rpc.rpc_forward_stream, forward)),
            (gradients, await streamed(rpc.rpc_backward_stream, backward)),
        )

    outputs, gradients = run(ask())
    for (output,) in outputs:
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)  # the order of sums depends on threads
    for got in gradients:
        torch.testing.assert_close(got[0], grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1], torch.stack(grad_prompts), atol=1e-5, rtol=1e-5)


def test_answers_in_the_compression_that_is_asked_for(rpc, span):
    hidden = states(1, 5, 64)
    half = runtime_pb2.CompressionType.FLOAT16
    (answer,) = run(rpc.rpc_forward(request(hidden, NONE, output_compression=(half,)), CONTEXT)).tensors
    assert answer.compression == half
    assert torch.allclose(deserialize_torch_tensor(answer), span.forward(hidden, 0, 4), atol=1e-2)
    for wrong in ([half, half], [99], "yes", [[1]], [True, None]):
        with pytest.raises(NodeRefused, match="output_compression"):
            run(rpc.rpc_forward(request(hidden, NONE, output_compression=wrong), CONTEXT))


def test_passes_are_refused_by_their_sizes_before_they_are_read(rpc, monkeypatch):
    def never(_tensor: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("petals_win.node.wire.deserialize_torch_tensor", never)
    for asked in (request(states(1, 65, 64), NONE), request(states(1, 5, 63), NONE), request(states(5, 64))):
        with pytest.raises(NodeRefused):
            run(rpc.rpc_forward(asked, CONTEXT))
    with pytest.raises(NodeRefused, match="needs 1"):
        run(rpc.rpc_forward(request(), CONTEXT))


def test_a_stream_that_does_not_end_is_refused_before_it_is_all_here(rpc):
    sent = 0

    async def endless() -> AsyncIterator[Any]:
        nonlocal sent
        while True:
            sent += 1
            yield runtime_pb2.ExpertRequest(uid=uid(), tensors=[runtime_pb2.Tensor(buffer=bytes(10_000))])

    async def ask():
        with pytest.raises(NodeRefused, match="bytes on this node"):
            await anext(rpc.rpc_forward_stream(endless(), CONTEXT))

    run(ask())
    assert sent * 10_000 < 6 * 64 * 64 * 8 + 20_000


def test_pieces_of_two_requests_in_one(rpc):
    async def two() -> AsyncIterator[Any]:
        yield request(states(1, 5, 64), blocks=uid(0, 1))
        yield request(states(1, 5, 64), blocks=uid(1, 2))

    async def ask():
        with pytest.raises(NodeRefused, match="different blocks"):
            await anext(rpc.rpc_forward_stream(two(), CONTEXT))

    run(ask())
