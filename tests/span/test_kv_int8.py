"""Keys and values in 8 bits: how far outputs are from those of the whole cache, what they take, and that sessions lose nothing by it."""

from __future__ import annotations

import pytest
import torch

from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span import cache as cache_module
from petals_win.span import kv_int8
from petals_win.span.footprint import model_footprint
from petals_win.span.needs import needs_of
from petals_win.span.scheduler import Scheduler
from petals_win.span.span import Span

# By a name of its own: a family, and what differs. All kinds of attention, by transformers' own code and by ours.
SHAPES: dict[str, tuple[str, dict]] = {
    "grouped heads": ("llama", {}),
    "no grouped heads": ("llama", {"num_key_value_heads": 4}),
    "one head of keys": ("llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "heads of 20": ("qwen3", {"head_dim": 20}),
    "heads of 34": ("qwen3", {"head_dim": 34}),
    "windows": ("mistral", {}),
    "windows in some blocks, soft caps": ("gemma2", {}),
    "windows in some blocks, sinks": ("gpt_oss", {}),
    "chunked windows": ("llama4_text", {}),
    "values of another size": ("deepseek_v3", {}),
    "positions by biases": ("bloom", {}),
    "experts": ("mixtral", {}),
}
PLAIN = ["grouped heads", "heads of 34", "windows"]
# Of what the blocks add to their inputs, the largest difference of a token. A number is off by at most 1/254 of the largest of its group.
CLOSE = 0.02
TOKENS = 60


@pytest.fixture(scope="module")
def spans(checkpoint):
    """The whole model with either cache, by the name of its shape."""
    made: dict[str, tuple[Span, Span]] = {}

    def make(shape: str, dtype: torch.dtype = torch.float32) -> tuple[Span, Span]:
        key = f"{shape} {dtype}"
        if key not in made:
            family, changes = SHAPES[shape]
            source = open_model(str(checkpoint(family, **changes)))
            full, small = (
                Span.load(source, 0, source.num_blocks, dtype=dtype, kv_cache=kept) for kept in ("auto", "int8")
            )
            made[key] = full, small
        return made[key]

    return make


@pytest.fixture
def small_pieces(monkeypatch):
    """So that a few tokens are several."""
    monkeypatch.setattr(kv_int8, "_AT_ONCE", 0)
    monkeypatch.setattr(kv_int8, "_PIECE_TOKENS", (7, 7))


def states(span: Span, tokens: int = TOKENS, rows: int = 1, seed: int = 0) -> torch.Tensor:
    hidden = torch.randn(rows, tokens, span.row.width, generator=torch.Generator().manual_seed(seed))
    return hidden.to(span.dtype)


def steps(span: Span, hidden: torch.Tensor, pieces: tuple[int, ...] = (30, 1, 1, 5, 1, 20, 1, 1)) -> torch.Tensor:
    session = span.open(len(hidden), hidden.shape[1])
    outputs = [span.step(session, piece) for piece in hidden.split(pieces, dim=1)]
    session.close()
    return torch.cat(outputs, dim=1)


def off(got: torch.Tensor, right: torch.Tensor, hidden: torch.Tensor) -> float:
    """The largest part of what was added to a token by which it is off."""
    distance, added = (got.float() - right.float()).norm(dim=-1), (right.float() - hidden.float()).norm(dim=-1)
    return (distance / added).max().item()


def same(got: torch.Tensor, right: torch.Tensor) -> None:
    """As far as rounding to 8 bits goes, which a difference in the last place of a number may tip over."""
    torch.testing.assert_close(got, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", [1, 12, 20, 32, 33, 64, 80, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_off_by_half_a_step_of_their_group(size, dtype):
    numbers = torch.randn(2, 3, 5, size, generator=torch.Generator().manual_seed(0))
    numbers = (numbers * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    numbers[0, 0, 0] = 0
    rows = kv_int8.packed(numbers)
    assert rows.dtype is torch.int8 and rows.shape == (2, 3, 5, kv_int8.packed_bytes(size))
    assert kv_int8.packed_bytes(size) == size + 2 * -(-size // 32) and kv_int8.unpacked_size(rows.shape[-1]) == size
    again = kv_int8.unpacked(rows, torch.float32)
    for group in range(0, size, 32):
        ours, theirs = again[..., group : group + 32], numbers[..., group : group + 32].float()
        step = theirs.abs().amax(-1, keepdim=True) / 127
        assert ((ours - theirs).abs() <= 0.502 * step).all()
    assert kv_int8.unpacked(rows, dtype).dtype is dtype


def test_what_is_not_finite_stays_so():
    for wrong in (float("nan"), float("inf"), -float("inf")):
        numbers = torch.ones(1, 40)
        numbers[0, 3] = wrong
        again = kv_int8.unpacked(kv_int8.packed(numbers), torch.float32)
        assert not again[0, :32].isfinite().all() and again[0, 32:].allclose(torch.ones(8), atol=0.01)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 9])
def test_attention_in_pieces_is_attention(small_pieces, heads, tokens):
    chance = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(3, count, length, size, generator=chance)
        for count, length, size in ((heads, tokens, 40), (2, 50, 40), (2, 50, 24))
    )
    mask = torch.ones(tokens, 50, dtype=torch.bool).tril(50 - tokens).triu(-30) if tokens > 1 else None
    mask = None if mask is None else mask[None, None]
    packed = kv_int8.packed(keys), kv_int8.packed(values)
    whole = [kv_int8.unpacked(each, torch.float32).repeat_interleave(heads // 2, dim=1) for each in packed]
    for scale in (None, 0.3):
        right = torch.nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=mask, scale=scale)
        torch.testing.assert_close(kv_int8.attend(query, *packed, mask, scale), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_close(spans, small_pieces, shape):
    full, small = spans(shape)
    hidden = states(full, rows=2)
    right, got = steps(full, hidden), steps(small, hidden)
    assert 0 < off(got, right, hidden) < CLOSE
    same(steps(small, hidden, (60,)), got)


@pytest.mark.parametrize("shape", PLAIN)
def test_outputs_are_close_in_16_bits(spans, shape):
    full, small = spans(shape, torch.bfloat16)
    hidden = states(full)
    assert off(steps(small, hidden), steps(full, hidden), hidden) < 2 * CLOSE


@pytest.mark.parametrize(
    "shape",
    [shape for shape in SHAPES if shape not in ("chunked windows", "values of another size", "positions by biases")],
)
def test_sessions_share_a_pass(spans, small_pieces, compute, shape):
    """Of all lengths, prompts and single tokens, none of which is unpacked as a whole."""
    _, small = spans(shape)
    assert small._joint.in_pieces
    scheduler, hidden = Scheduler(small, compute), [states(small, seed=seed) for seed in range(4)]
    right = [steps(small, each) for each in hidden]
    sessions, done = [small.open(1, TOKENS) for _ in hidden], [0] * len(hidden)
    for turn in range(12):
        now = [1 if turn % 3 else 1 + 3 * number for number in range(len(hidden))]
        futures = [
            scheduler.step(session, each[:, begin : begin + count])
            for session, each, begin, count in zip(sessions, hidden, done, now, strict=True)
        ]
        for number, future in enumerate(futures):
            same(future.result(60), right[number][:, done[number] : done[number] + now[number]])
            done[number] += now[number]


@pytest.mark.parametrize("shape", PLAIN)
def test_no_more_than_a_piece_is_unpacked(spans, small_pieces, monkeypatch, shape):
    _, small = spans(shape)
    most, unpack = [0], kv_int8.unpacked

    def counting(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        most.append(rows.shape[2])
        return unpack(rows, dtype)

    for module in (kv_int8, cache_module):
        monkeypatch.setattr(module, "unpacked", counting)
    steps(small, states(small))
    assert max(most) == 7


@pytest.mark.parametrize("shape", PLAIN)
def test_rows_are_reordered_and_tokens_taken_back(spans, shape):
    _, small = spans(shape)
    hidden, order = states(small, rows=3), torch.tensor([2, 0, 0])
    session = small.open(3, TOKENS)
    small.step(session, hidden[:, :20])
    small.step(session, states(small, 4, 3, seed=5))
    got = small.step(session, hidden[order, 20:21], hypo_ids=order, start=20)
    same(got, steps(small, hidden[order, :21], (20, 1))[:, 20:])
    assert session.position == 21


@pytest.mark.parametrize("shape", PLAIN)
def test_another_session_goes_on_from_what_one_has_left(spans, shape):
    _, small = spans(shape)
    hidden, session = states(small), small.open(1, TOKENS)
    small.step(session, hidden[:, :50])
    state = session.leave(40)
    assert state is not None and state.nbytes <= small.session_bytes(1, 50)
    later = small.open(1, TOKENS, past=(state, 40))
    assert later.position == 40
    same(small.step(later, hidden[:, 40:]), steps(small, hidden)[:, 40:])
    state.free()


@pytest.mark.parametrize("shape", PLAIN)
def test_it_takes_a_quarter_of_the_memory_and_as_much_as_is_said(spans, checkpoint, shape):
    full, small = spans(shape)
    family, changes = SHAPES[shape]
    config = open_model(str(checkpoint(family, **changes))).config
    for span in (full, small):
        session = span.open(2, TOKENS, room=20)
        session.room = TOKENS
        span.step(session, states(span, rows=2))
        assert session.open_cache.nbytes == span.session_bytes(2, TOKENS)
        footprint = model_footprint(config, torch.float32, kv_cache=span.kv_cache)
        assert sum(footprint.cache_bytes_per_token) == span.cache_bytes_per_token
        assert (
            needs_of(config, torch.float32, kv_cache=span.kv_cache).cache_bytes_per_token
            == footprint.cache_bytes_per_token
        )
    assert small.cache_bytes_per_token < 0.29 * full.cache_bytes_per_token
    if shape != "windows":  # whose sessions take no more from some length on
        assert small.longest_session(10**6, 10**6) > 3.4 * full.longest_session(10**6, 10**6)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "deepseek_v32"])
def test_what_keeps_something_else_is_refused_by_name(checkpoint, family):
    source = open_model(str(checkpoint(family)))
    for ask in (
        lambda: Span.load(source, 0, source.num_blocks, kv_cache="int8"),
        lambda: needs_of(source.config, torch.float32, kv_cache="int8"),
    ):
        with pytest.raises(
            UserError, match=f"of the type {source.config.model_type} keep more .* Leave --kv-cache-dtype out"
        ):
            ask()


def test_another_word_is_no_cache():
    with pytest.raises(UserError, match="auto or int8, not in fp8"):
        kv_int8.parse_kv_cache_dtype("fp8")
    assert [kv_int8.parse_kv_cache_dtype(known) for known in ("auto", "int8")] == ["auto", "int8"]
