"""Records of the DHT that make no sense: they are skipped and counted, and the others are found, whoever reads."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hivemind import DHT, MSGPackSerializer, PeerID, get_dht_time
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration
from petals.client.config import ClientConfig
from petals.client.routing.sequence_info import RemoteSequenceInfo
from petals.client.routing.sequence_manager import MissingBlocksError, RemoteSequenceManager
from petals.data_structures import RemoteModuleInfo, ServerInfo, ServerState
from petals.utils.dht import _known_server, compute_spans, declare_active_modules, get_remote_module_infos

from petals_win.dht.entries import BadRecord, skipped
from petals_win.swarm.records import check_announcement, check_peer_id, read_servers
from petals_win.swarm.state import read_state

PREFIX, BLOCKS = "tiny", 4
UIDS = [f"{PREFIX}.{block}" for block in range(BLOCKS)]
PEER = "12D3KooWKMhEkmWWGzBQZBQbmFHhf1C4B6vQTk4PmEMG3QJTPRnJ"
OTHER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def announcement(state: object = 2, throughput: object = 10.0, **more: object) -> tuple:
    return (state, throughput, {"start_block": 0, "end_block": BLOCKS, **more})


@pytest.fixture
def peers() -> Iterator[tuple[DHT, DHT]]:
    """One that checks nothing of what it keeps, as upstream's do, and one that reads from it."""
    careless = DHT(start=True)
    reader = DHT(initial_peers=[str(maddr) for maddr in careless.get_visible_maddrs()], start=True)
    yield careless, reader
    reader.shutdown()
    careless.shutdown()


def keep(dht: DHT, uid: str, entries: dict[Any, bytes]) -> None:
    """Put entries into a node's own part of the DHT, past all checks."""

    async def put(_dht, node):
        key = DHTID.generate(source=uid)
        known = node.protocol.storage.get(key)
        dictionary = known.value if known is not None else DictionaryDHTValue()
        for subkey, value in entries.items():
            ends = get_dht_time() + 60 + random.random()
            dictionary.data[subkey] = ValueWithExpiration(value, ends)
            dictionary.latest_expiration_time = max(dictionary.latest_expiration_time, ends)
        TimedStorage.store(node.protocol.storage, key, dictionary, get_dht_time() + 61)

    dht.run_coroutine(put)


def announce(dht: DHT, blocks: list[str] = UIDS, **more: Any) -> None:
    info = ServerInfo(ServerState.ONLINE, 10.0, start_block=0, end_block=BLOCKS, inference_rps=10.0, **more)
    declare_active_modules(dht, blocks, info, get_dht_time() + 60)


BAD_ENTRIES: dict[Any, bytes] = {
    5: MSGPackSerializer.dumps(announcement()),
    b"bytes": MSGPackSerializer.dumps(announcement()),
    "no peer": MSGPackSerializer.dumps(announcement()),
    PEER: b"\xc1 is no msgpack",
    OTHER: MSGPackSerializer.dumps(announcement(inference_rps=0.0)),
    OTHER[:-1] + "Z": MSGPackSerializer.dumps("x" * 100_000),
}


def test_a_malformed_entry_hides_nobody_else(peers, caplog):
    careless, reader = peers
    announce(reader)
    for uid in UIDS:
        keep(careless, uid, BAD_ENTRIES)
    skipped.count = 0
    with caplog.at_level(logging.WARNING, "petals_win"):
        for _ in range(2):
            for dht in peers:
                infos = get_remote_module_infos(dht, UIDS, latest=True)
                assert [set(info.servers) for info in infos] == [{reader.peer_id}] * BLOCKS
                state = asyncio.run(read_state(dht, PREFIX, BLOCKS))
                assert [peer.peer_id for peer in state.peers] == [str(reader.peer_id)] and not state.missing_blocks
    assert skipped.count >= BLOCKS * len(BAD_ENTRIES)
    assert len([record for record in caplog.records if record.name == "petals_win.dht.entries"]) == 1


@pytest.mark.parametrize("subkey", [5, b"x", None, 1.5, ["list"]])
def test_nothing_malformed_is_taken_in(peers, subkey):
    """A peer that sends it is refused, and what is there already stays."""
    careless, reader = peers
    announce(reader)

    async def send(_dht, node):
        key, ends = DHTID.generate(source=UIDS[0]), get_dht_time() + 120
        if subkey is None:  # a plain value instead of a dictionary, which ends later than all entries
            return await node.protocol.call_store(reader.peer_id, [key], [MSGPackSerializer.dumps(7)], ends)
        value = MSGPackSerializer.dumps(announcement())
        return await node.protocol.call_store(reader.peer_id, [key], [value], ends, subkeys=[subkey])

    assert not any(careless.run_coroutine(send) or [])
    assert reader.peer_id in get_remote_module_infos(reader, UIDS, latest=True)[0].servers


def test_a_plain_value_below_a_block_hides_no_entries(peers):
    careless, reader = peers
    announce(reader)

    async def put(_dht, node):
        for uid in UIDS:
            key, ends = DHTID.generate(source=uid), get_dht_time() + 600
            TimedStorage.store(node.protocol.storage, key, MSGPackSerializer.dumps(7), ends)

    careless.run_coroutine(put)
    announce(reader)
    for dht in peers:
        assert [set(info.servers) for info in get_remote_module_infos(dht, UIDS, latest=True)] == [
            {reader.peer_id}
        ] * BLOCKS


def test_a_route_is_made_of_what_makes_sense(peers):
    careless, reader = peers
    announce(careless, next_pings={str(reader.peer_id): math.inf})
    for number, uid in enumerate(UIDS):
        wrong = {"inference_rps": 0.0} if number % 2 else {"next_pings": {str(careless.peer_id): math.nan}}
        keep(careless, uid, {PEER: MSGPackSerializer.dumps(announcement(**wrong))})
    manager = RemoteSequenceManager(ClientConfig(dht_prefix=PREFIX), UIDS, dht=reader)
    try:
        for mode in ("min_latency", "max_throughput"):
            (span,) = manager.make_sequence(mode=mode)
            assert (span.peer_id, span.start, span.end) == (careless.peer_id, 0, BLOCKS)
    finally:
        manager.shutdown()


WRONG = [
    5,
    "text",
    (),
    (2,),
    (2, 10.0, {}, 4),
    (7, 10.0),
    (True, 10.0),
    ("ONLINE", 10.0),
    announcement(throughput=math.nan),
    announcement(throughput=math.inf),
    announcement(throughput=-1.0),
    announcement(throughput=1e300),
    announcement(throughput="10"),
    (2, 10.0, [1, 2]),
    (2, 10.0, {5: 6}),
    announcement(start_block=3, end_block=1),
    announcement(start_block=-1),
    announcement(start_block=2, end_block=2),
    announcement(start_block=2, end_block=3),
    announcement(start_block=None),
    announcement(end_block=10**9),
    announcement(end_block=2.5),
    announcement(end_block=True),
    announcement(inference_rps=0),
    announcement(inference_rps=1e-300),
    announcement(inference_rps=-1.0),
    announcement(forward_rps=math.nan),
    announcement(network_rps=b"1"),
    announcement(public_name=b"bytes"),
    announcement(public_name="x" * 10_000),
    announcement(public_name="\x1b[31mred"),
    announcement(version=3),
    announcement(torch_dtype=["float32"]),
    announcement(adapters="abc"),
    announcement(adapters=[1]),
    announcement(adapters=["a"] * 5000),
    announcement(using_relay="yes"),
    announcement(cache_tokens_left=-1),
    announcement(cache_tokens_left=1.5),
    announcement(next_pings=[0.1]),
    announcement(next_pings={5: 0.1}),
    announcement(next_pings={PEER: -1.0}),
    announcement(next_pings={PEER: math.nan}),
    announcement(next_pings={str(number): 0.1 for number in range(5000)}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: repr(wrong)[:60])
def test_announcements_that_make_no_sense(wrong):
    with pytest.raises(BadRecord):
        check_announcement(wrong, block=1)


@pytest.mark.parametrize(
    "right",
    [
        (1, 0.0),
        (2, 10, {}),
        (0, 1.0, {"adapters": [], "next_pings": None}),
        announcement(
            next_pings={PEER: math.inf, OTHER: 0.5}, public_name="Jörgs PC 🎮", of_a_later_version={"x": [1]}
        ),
    ],
)
def test_announcements_that_make_sense(right):
    check_announcement(right, block=1)
    assert _known_server(PEER, right)[1].state.value == right[0]


@pytest.mark.parametrize("name", [5, None, b"Qm", "", "Qm", OTHER + "a", "0" * 46, PEER[:-1], "x" * 10**6])
def test_names_of_no_peer(name):
    with pytest.raises(BadRecord):
        check_peer_id(name)
    for known in (PEER, OTHER):
        check_peer_id(known)


def random_value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that msgpack can carry, often shaped like an announcement."""
    number = draw.choice(
        [0, -1, 1, 2, 3, 7, 2**63 - 1, -(2**63), 0.0, -0.5, 1e-308, 1e308, math.nan, math.inf, -math.inf]
    )
    names = [*ServerInfo.__dataclass_fields__, "", "x", "ü" * 600]
    kinds: list[Any] = [
        number,
        True,
        None,
        b"\xff" * draw.randrange(40),
        draw.choice([PEER, OTHER, "", "a\0b", "é" * 700]),
    ]
    if depth < 3:
        some = range(draw.randrange(4))
        kinds.append([random_value(draw, depth + 1) for _ in some])
        kinds.append(tuple(random_value(draw, depth + 1) for _ in some))
        kinds.append({draw.choice(names): random_value(draw, depth + 1) for _ in some})
        details = {draw.choice(names): random_value(draw, depth + 1) for _ in some}
        blocks = {"start_block": draw.randrange(-1, 6), "end_block": draw.randrange(-1, 6)}
        kinds += [(draw.choice([0, 1, 2, number]), draw.choice([1.0, number]), {**blocks, **details})] * 6
    return draw.choice(kinds)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_records_hold_routes_can_be_made(seed):
    draw = random.Random(seed)
    good = PeerID.from_base58(OTHER)
    for _ in range(30):
        infos = []
        for uid in UIDS:
            entries: dict[Any, Any] = {OTHER: ValueWithExpiration(announcement(inference_rps=5.0), 1.0)}
            for number in range(draw.randrange(6)):
                peer = draw.choice([5, b"b", None, "", PEER, f"{PEER[:-1]}{number + 1}", f"{PEER[:-2]}{number + 1}a"])
                entries[peer] = draw.choice(
                    [random_value(draw), ValueWithExpiration(_carried(random_value(draw)), 1.0)]
                )
            found = draw.choice(
                [ValueWithExpiration(entries, 1.0)] * 9 + [ValueWithExpiration(random_value(draw), 1.0)]
            )
            servers = read_servers(uid, found, _known_server)
            infos.append(RemoteModuleInfo(uid, servers))
            block = int(uid.rpartition(".")[2])
            for server in servers.values():
                assert server.start_block is None or server.start_block <= block < server.end_block
                assert server.inference_rps is None or 0 < 1 / server.inference_rps < math.inf
        for lowest in ServerState:
            for span in compute_spans(infos, min_state=lowest).values():
                assert 0 <= span.start < span.end <= BLOCKS
        sequence = RemoteSequenceInfo.make_empty(UIDS)
        sequence.update_(infos)
        if all(good in info.servers for info in infos):
            _check_route(sequence)


def _carried(value: Any) -> Any:
    return MSGPackSerializer.loads(MSGPackSerializer.dumps(value))


def _check_route(sequence: RemoteSequenceInfo) -> None:
    manager = RemoteSequenceManager.__new__(RemoteSequenceManager)
    manager.state = type("State", (), {"sequence_info": sequence})()
    manager.ping_aggregator = type("Pings", (), {"to_dict": lambda _: {}})()
    manager.lock_changes = threading.Lock()
    try:
        route = manager._make_sequence_with_min_latency(0, BLOCKS, cache_tokens_needed=100)
    except MissingBlocksError:
        raise AssertionError("the good server was lost") from None
    assert [span.start for span in route][0] == 0 and route[-1].end == BLOCKS
    assert all(one.end == two.start for one, two in zip(route, route[1:], strict=False))


def test_thousands_of_entries_are_bounded(peers):
    careless, reader = peers
    announce(reader)
    value = MSGPackSerializer.dumps(announcement())
    keep(careless, UIDS[0], {f"{OTHER[:-4]}{number:04d}".replace("0", "z"): value for number in range(3000)})
    assert len(get_remote_module_infos(reader, UIDS, latest=True)[0].servers) <= 1000


def test_a_server_that_moved_holds_only_where_it_is():
    """Old announcements of other blocks do not stretch its span over what lies between."""
    peer = PeerID.from_base58(PEER)

    def info(start: int, end: int) -> ServerInfo:
        return ServerInfo(ServerState.ONLINE, 1.0, start_block=start, end_block=end)

    infos = [RemoteModuleInfo(f"{PREFIX}.{block}", {}) for block in range(6)]
    infos[0].servers[peer], infos[4].servers[peer], infos[5].servers[peer] = info(0, 1), info(4, 6), info(4, 6)
    span = compute_spans(infos, min_state=ServerState.ONLINE)[peer]
    assert (span.start, span.end) == (0, 1)


def test_a_key_of_whole_nodes_holds_any_range_that_is_one():
    entries = {
        PEER: ValueWithExpiration(announcement(), 1.0),
        OTHER: ValueWithExpiration(announcement(end_block=0), 1.0),
    }
    found = read_servers("llama-0123456789abcdef", ValueWithExpiration(entries, 1.0), _known_server)
    assert list(found) == [PeerID.from_base58(PEER)]
