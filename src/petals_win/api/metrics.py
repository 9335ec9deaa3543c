"""GET /metrics: what is counted and how things stand, as Prometheus reads it. Knows the engine protocol and the text form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastapi import APIRouter, Request
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response

from petals_win.api import reply_schemas as sent
from petals_win.api.generations import Generations
from petals_win.engines.base import Engine, EngineStatus, SwarmStatus


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
        engines = _by_engine(self._engine.status(), [card.id for card in self._engine.models()])
        of_models = {model: self._generations.of_model(model) for models in engines.values() for model in models}
        running = {model: counts[0] for model, counts in of_models.items()}
        waiting = {model: counts[1] for model, counts in of_models.items()}
        yield _gauge("vllm:num_requests_running", "Requests that are being answered.", running)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", waiting)

        def told(value: Callable[[EngineStatus | SwarmStatus], float | None]) -> dict[str, float]:
            """What is so for an engine, for each of its models, as far as it is known."""
            return {
                model: found
                for engine, models in engines.items()
                if (found := value(engine)) is not None
                for model in models
            }

        yield _gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the memory for conversations that is in use, 1 being all.",
            told(lambda engine: engine.cache_usage),
        )
        ready = "1 if a question could be answered now, else 0."
        yield _gauge("petals_win_ready", ready, told(lambda engine: engine.ready))
        loaded = "1 if the model is in memory, 0 if it is loaded when somebody asks for it."
        yield _gauge("petals_win_loaded", loaded, told(_loaded))
        yield _gauge("petals_win_blocks", "Blocks of the model.", told(lambda engine: engine.num_blocks))
        missing = "Blocks that have no server."
        yield _gauge("petals_win_blocks_missing", missing, told(lambda engine: len(engine.missing_blocks)))
        yield _gauge("petals_win_peers", "PCs that serve blocks.", told(lambda engine: len(engine.peers)))
        of_peer = ["model_name", "peer_id", "name"]
        speed = GaugeMetricFamily(
            "petals_win_peer_throughput", "Tokens per second of one block, as a PC says.", None, of_peer
        )
        room = GaugeMetricFamily("petals_win_peer_cache_tokens_left", "Tokens that a PC has room for.", None, of_peer)
        relayed = GaugeMetricFamily(
            "petals_win_peer_relayed", "1 if a PC is reached through another one.", None, of_peer
        )
        for engine, models in engines.items():
            for peer in engine.peers if models else ():
                labels = [models[0], peer.peer_id, peer.name or ""]  # an engine has one swarm, that of its model
                for family, value in (
                    (speed, peer.throughput),
                    (room, peer.cache_tokens_left),
                    (relayed, peer.relayed),
                ):
                    if value is not None:
                        family.add_metric(labels, float(value))
        yield from (speed, room, relayed)


def _by_engine(status: SwarmStatus, models: list[str]) -> dict[EngineStatus | SwarmStatus, list[str]]:
    """The models of each engine; an engine that is not one of several stands for itself."""
    return {engine: list(engine.models) for engine in status.engines} or {status: models}


def _loaded(engine: EngineStatus | SwarmStatus) -> float | None:
    return engine.state == "loaded" if isinstance(engine, EngineStatus) else None


def _gauge(name: str, documentation: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, documentation, labels=["model_name"])
    for model, value in values.items():
        gauge.add_metric([model], float(value))
    return gauge
