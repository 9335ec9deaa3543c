"""GET /metrics: what is counted and how things stand, as Prometheus reads it. Knows the engine protocol and the text form."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, Request
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response

from petals_win.api import reply_schemas as sent
from petals_win.api.generations import Generations
from petals_win.engines.base import Engine, ModelCard


def metrics_routes(engine: Engine, generations: Generations) -> APIRouter:
    """What Prometheus asks for every few seconds."""
    router = APIRouter()
    registry = generations.counts.registry
    registry.register(_State(engine, generations))
    text = {"text/plain": {"schema": {"type": "string"}}}

    @router.get(
        "/metrics",
        response_class=Response,
        responses=sent.errors(401, 403, 500) | {200: {"content": text, "description": "Metrics as text."}},
    )
    async def metrics(http: Request) -> Response:
        """Requests, tokens, times and the swarm's state for Prometheus; names are vLLM's where the thing is the same."""
        encode, media_type = choose_encoder(http.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": media_type})

    return router


class _State(Collector):
    """How things stand at the moment in which somebody looks."""

    def __init__(self, engine: Engine, generations: Generations):
        self._engine, self._generations = engine, generations

    def describe(self) -> Iterable[Metric]:
        """Said without asking the engine, which has perhaps not started."""
        return []

    def collect(self) -> Iterable[Metric]:
        status = self._engine.status()
        models = self._engine.models()
        running = self._generations.running
        waiting = self._generations.waiting
        yield _gauge("vllm:num_requests_running", "Requests that are being answered.", models, running)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", models, waiting)
        if status.cache_usage is not None:
            yield _gauge(
                "vllm:kv_cache_usage_perc",
                "Share of the memory for conversations that is in use, 1 being all.",
                models,
                status.cache_usage,
            )
        yield _gauge("petals_win_ready", "1 if a question could be answered now, else 0.", models, status.ready)
        yield _gauge("petals_win_blocks", "Blocks of the model.", models, status.num_blocks)
        yield _gauge("petals_win_blocks_missing", "Blocks that have no server.", models, len(status.missing_blocks))
        yield _gauge("petals_win_peers", "PCs that serve blocks.", models, len(status.peers))
        of_peer = ["model_name", "peer_id", "name"]
        speed = GaugeMetricFamily(
            "petals_win_peer_throughput", "Tokens per second of one block, as a PC says.", None, of_peer
        )
        room = GaugeMetricFamily("petals_win_peer_cache_tokens_left", "Tokens that a PC has room for.", None, of_peer)
        relayed = GaugeMetricFamily(
            "petals_win_peer_relayed", "1 if a PC is reached through another one.", None, of_peer
        )
        for model in models[:1]:
            for peer in status.peers:
                labels = [model.id, peer.peer_id, peer.name or ""]
                for family, value in (
                    (speed, peer.throughput),
                    (room, peer.cache_tokens_left),
                    (relayed, peer.relayed),
                ):
                    if value is not None:
                        family.add_metric(labels, float(value))
        yield from (speed, room, relayed)


def _gauge(name: str, documentation: str, models: list[ModelCard], value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, documentation, labels=["model_name"])
    for model in models[:1]:  # an engine has one swarm, that of its model
        gauge.add_metric([model.id], float(value))
    return gauge
