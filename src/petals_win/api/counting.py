"""What is counted while answers are made: tokens, times and ends, for /metrics.

Knows the events of an answer and Prometheus' kinds of metrics. Names are vLLM's where the thing is the same, so that dashboards
made for it show this, too.
"""

from __future__ import annotations

import functools
import time

from prometheus_client import CollectorRegistry, Counter, Histogram

from petals_win.engines.base import Event, Finished, Usage

# Seconds. A small model on a fast GPU and 70 billion parameters over the internet both have to find their place.
_STEP = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
_FIRST = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)

ABORTED = "abort"


class Counts:
    """The counters and histograms of one API, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of_model = {"labelnames": ["model_name"], "registry": self.registry}

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, documentation, buckets=buckets, **of_model)

        self.prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts.", **of_model)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens of answers.", **of_model)
        self.cache_queries = Counter(
            "vllm:prefix_cache_queries", "Tokens of prompts, any of which could have been computed before.", **of_model
        )
        self.cache_hits = Counter(
            "vllm:prefix_cache_hits", "Tokens of prompts that an earlier request had left computed.", **of_model
        )
        self.success = Counter(
            "vllm:request_success",
            "Answers by how they ended: stop, length, tool_calls, or abort if nobody waited for the end.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.failed = Counter(
            "petals_win_requests_failed",
            "Answers that broke, by the HTTP status that says so.",
            ["model_name", "status"],
            registry=self.registry,
        )
        self.refused = Counter(
            "petals_win_requests_refused",
            "Requests refused with status 429: too many at once (full), or a limit of the key (key).",
            ["reason"],
            registry=self.registry,
        )
        self.queue = histogram("vllm:request_queue_time_seconds", "From the request to its turn.", _FIRST)
        self.first = histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", _FIRST)
        self.step = histogram("vllm:inter_token_latency_seconds", "From one piece of an answer to the next.", _STEP)
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Of each answer, the time between two tokens after the first.",
            _STEP,
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "From the request to the end of its answer.", _WHOLE
        )


class Run:
    """One answer that is being counted, from the moment in which it was asked for."""

    def __init__(self, counts: Counts, model: str):
        self._counts, self._model = counts, model
        self._asked = time.perf_counter()
        self._first = self._last = 0.0
        self._pieces = 0
        self._reason = ""
        self._ended = False

    def has_turn(self) -> None:
        """It does not wait for others any more."""
        self._counts.queue.labels(self._model).observe(time.perf_counter() - self._asked)

    def event(self, event: Event) -> None:
        """Something of the answer is there."""
        match event:
            case Finished():
                self._reason = event.reason
            case Usage():
                self._complete(event)
            case _:
                self._piece()

    def aborted(self) -> None:
        """It was given up; if before its end, then how many tokens its prompt had is not known."""
        if self._ended:
            return
        self._counts.generation_tokens.labels(self._model).inc(self._pieces)
        self._end(ABORTED)

    def failed(self, status: int) -> None:
        """It broke."""
        self._counts.generation_tokens.labels(self._model).inc(self._pieces)
        self._counts.failed.labels(self._model, str(status)).inc()

    @functools.cached_property
    def _step(self) -> Histogram:
        """That of its model, which takes as long to look up as to count in, for every token."""
        return self._counts.step.labels(self._model)

    def _piece(self) -> None:
        now = time.perf_counter()
        if self._pieces:
            self._step.observe(now - self._last)
        else:
            self._first = now
            self._counts.first.labels(self._model).observe(now - self._asked)
        self._last = now
        self._pieces += 1

    def _complete(self, usage: Usage) -> None:
        self._counts.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._counts.generation_tokens.labels(self._model).inc(usage.completion_tokens)
        self._counts.cache_queries.labels(self._model).inc(usage.prompt_tokens)
        self._counts.cache_hits.labels(self._model).inc(usage.cached_tokens)
        if usage.completion_tokens > 1 and self._pieces:
            per_token = (self._last - self._first) / (usage.completion_tokens - 1)
            self._counts.per_token.labels(self._model).observe(per_token)
        self._end(self._reason)

    def _end(self, reason: str) -> None:
        self._ended = True
        self._counts.success.labels(self._model, reason).inc()
        self._counts.whole.labels(self._model).observe(time.perf_counter() - self._asked)
