"""A GGUF file computes as the model it was made of, or says what of it cannot be computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from span.families import VOCABULARY

from models.gguf_writer import hyperparameters, llama3_divisors, write_gguf
from petals_win.errors import UserError
from petals_win.models import gguf_file
from petals_win.models.gguf_metadata import read_config
from petals_win.models.source import ModelSource, open_model
from petals_win.span.span import Span

IDS = (torch.arange(48)[None] * 7) % VOCABULARY

# What Gemma's files do not tell, since no model that there is has it otherwise.
GEMMA = {"query_pre_attn_scalar": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


DEEPSEEK_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
DEEPSEEK_YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707}


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


@pytest.fixture
def converted(checkpoint, tmp_path):
    """Makes a model and a GGUF file of it; gives both opened."""

    def make(family: str, *, keys=None, tensors=None, without=(), **changes) -> tuple[ModelSource, ModelSource]:
        original = open_model(str(checkpoint(family, **changes)))
        path = write_gguf(original.whole_model(), tmp_path / f"{family}.gguf", keys, tensors, without)
        return original, open_model(str(path))

    return make


def assert_same(original: ModelSource, file: ModelSource, start: int = 1, end: int = 3) -> None:
    """Logits, and what blocks in the middle make of random hidden states."""
    with torch.no_grad():
        wanted, found = (source.whole_model()(input_ids=IDS).logits for source in (original, file))
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    spans = [Span.load(source, start, end) for source in (original, file)]
    hidden = torch.randn(1, 40, spans[0].row.width)
    wanted, found = (span.forward(hidden, start, end) for span in spans)
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize(
    "family, changes, keys",
    [
        ("llama", {}, {}),
        ("llama", {"head_dim": 32}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("llama", {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {}),
        ("mistral", {}, {".attention.sliding_window": 8}),
        ("qwen2", {}, {}),
        ("qwen2_moe", {}, {}),
        ("qwen3", {}, {}),
        ("qwen3_moe", {"norm_topk_prob": True}, {}),
        ("phi3", {}, {}),
        ("phi3", {"sliding_window": None}, {}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}),
        ("gemma2", GEMMA, {}),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}),
        ("gemma3_text", GEMMA, {".attention.sliding_window_pattern": 2}),
        ("gemma3_text", {**GEMMA, "sliding_window_pattern": 6, "num_hidden_layers": 6}, {}),
        ("starcoder2", {"sliding_window": None}, {}),
        ("stablelm", {}, {}),
        ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}, {}),
        ("nemotron", {}, {}),
        ("falcon", {}, {}),
        ("falcon-new", {}, {}),
        ("falcon-new", {"num_ln_in_parallel_attn": 1}, {}),
        ("mixtral", {}, {}),
        ("gpt_oss", {}, {}),
        ("minimax_m2", {"rotary_dim": 8}, {}),
        ("granite", {"attention_multiplier": 0.1, "logits_scaling": 4.0}, {}),
        ("cohere", {}, {}),
        ("cohere2", {}, {}),
        ("olmo2", {}, {}),
        ("gemma", {}, {}),
        ("gpt2", {}, {}),
        ("bloom", {}, {}),
        ("smollm3", {"no_rope_layer_interval": 4}, {}),
        ("glm4", {}, {}),
        ("glm4", {"attention_bias": False}, {}),
        ("deepseek_v3", {}, {}),
        ("deepseek_v3", {"q_lora_rank": None, "n_group": 1}, {}),
        ("deepseek_v3", {"rope_parameters": DEEPSEEK_YARN}, {".rope.scaling.yarn_log_multiplier": 0.0707}),
        ("deepseek_v2", {}, {}),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}, {}),
        ("ministral3", {}, {}),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": None},
            {},
        ),
        (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False},
            {},
        ),
        ("gemma4-experts", {}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_file_computes_as_its_original(converted, family, changes, keys):
    assert_same(*converted(family, keys=keys, **changes))


def test_blocks_of_gemma_4_that_take_keys_of_others(converted):
    assert_same(*converted("gemma4_text"), start=2, end=8)


def test_keys_that_a_block_of_gemma_4_has_for_nothing(converted):
    """Files have keys and values also of blocks that take those of others."""
    needless = {f"blk.6.attn_{name}.weight": np.ones((24, 64), dtype=np.float32) for name in ("k", "v")}
    needless["blk.6.attn_k_norm.weight"] = np.ones(12, dtype=np.float32)
    assert_same(*converted("gemma4_text", tensors=needless), start=2, end=8)
    with pytest.raises(
        UserError, match=r"has the tensor blk.6.attn_v_norm.weight, for which transformers' gemma4_text"
    ):
        converted("gemma4_text", tensors={"blk.6.attn_v_norm.weight": np.ones(12, dtype=np.float32)})


def test_experts_of_gemma_4_in_two_parts(converted):
    """As other converters write them."""
    original, _ = converted("gemma4-experts")
    model = original.whole_model()
    fused = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("gate_up_proj")}
    halves = {
        f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight": half.numpy()
        for name, tensor in fused.items()
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)
    }
    whole = [f"blk.{name.split('.')[2]}.ffn_gate_up_exps.weight" for name in fused]
    assert len(whole) == 4
    assert_same(*converted("gemma4-experts", tensors=halves, without=tuple(whole)))


def test_gemma_3n(converted):
    original, file = converted("gemma3n_text")
    assert file.config.activation_sparsity_pattern == original.config.activation_sparsity_pattern
    assert_same(original, file, start=2, end=8)


@pytest.mark.parametrize(
    ("keys", "without", "said"),
    [
        ({}, (".altup.num_inputs",), "lacks gemma3n.altup.num_inputs"),
        ({}, (".attention.shared_kv_layers",), "lacks gemma3n.attention.shared_kv_layers"),
        ({}, ("blk.0.laurel_l.weight",), "lacks the tensor blk.0.laurel_l.weight"),
        ({}, (".activation_sparsity_scale",), "gemma3n.activation_sparsity_scale is None"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0}, (), "gemma3n.rope.scaling.type is 'yarn'"),
    ],
)
def test_a_gemma_3n_of_another_kind_is_refused_by_name(converted, keys, without, said):
    with pytest.raises(UserError, match=said):
        converted("gemma3n_text", keys=keys, without=without)


ROPE_OF_GEMMA4 = np.array([1.0] * 2 + [1e30] * 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("keys", "tensors", "without", "said"),
    [
        ({}, {}, (".attention.sliding_window_pattern",), "lacks gemma4.attention.sliding_window_pattern"),
        ({}, {}, (".attention.key_length_swa",), "lacks gemma4.attention.key_length_swa"),
        ({".attention.value_length_swa": 10}, {}, (), "gemma4.attention.value_length_swa is 10"),
        ({".rope.dimension_count": 10}, {}, (), "gemma4.rope.dimension_count is 10"),
        ({".rope.scaling.type": "yarn"}, {}, (), "gemma4.rope.scaling.type is yarn"),
        ({".attention.head_count_kv": [2, 2, 2, 1, 2, 2, 2, 2]}, {}, (), "gemma4.attention.head_count_kv is "),
        ({".attention.head_count_kv": [2, 2]}, {}, (), "gemma4.attention.head_count_kv is "),
        ({".feed_forward_length": [96] * 6 + [192] * 2}, {}, (), "gemma4.feed_forward_length is "),
        ({}, {"rope_freqs.weight": ROPE_OF_GEMMA4[::-1]}, (), "rope_freqs.weight in a way of its own"),
        ({}, {"rope_freqs.weight": ROPE_OF_GEMMA4 * 2}, (), "rope_freqs.weight in a way of its own"),
    ],
)
def test_a_gemma_4_of_another_kind_is_refused_by_name(converted, keys, tensors, without, said):
    with pytest.raises(UserError, match=said):
        converted("gemma4_text", keys=keys, tensors=tensors, without=without)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_head_of_its_own_is_used(converted, family, tied):
    original, file = converted(family, tie_word_embeddings=tied)
    assert file.config.tie_word_embeddings is tied
    assert_same(original, file)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5},
    ],
    ids=["linear", "yarn", "yarn-betas", "yarn-attention"],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_embeddings(converted, family, rope):
    keys = {f".rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
    if "attention_factor" in rope:
        keys[".rope.scaling.attn_factor"] = rope["attention_factor"] / (0.1 * np.log(4.0) + 1)
    original, file = converted(family, keys=keys, rope_parameters={"rope_theta": 1e4, **rope})
    assert file.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert_same(original, file)


@pytest.mark.parametrize(
    "keys, without",
    [
        ({".rope.scale_linear": 4.0}, (".rope.scaling.type", ".rope.scaling.factor")),
        ({}, (".rope.scaling.type",)),  # linear is what a factor alone means
    ],
)
def test_linear_scaling_of_older_files(converted, keys, without):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert_same(*converted("llama", keys=keys, without=without, rope_parameters=rope))


def test_no_scaling_whatever_the_factor(converted):
    assert_same(*converted("llama", keys={".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}))


@pytest.mark.parametrize("scaling", [LLAMA3, {**LLAMA3, "factor": 32.0}], ids=["8", "32"])
def test_llama_3_s_scaling_lies_in_a_tensor(converted, scaling):
    divisors = llama3_divisors(32, 5e5, *scaling.values())
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    changes = {"head_dim": 32, "rope_parameters": rope, "max_position_embeddings": 131_072}
    original, file = converted("llama", tensors={"rope_freqs.weight": divisors}, **changes)
    assert {key: file.config.rope_parameters[key] for key in scaling} == pytest.approx(scaling, rel=1e-3)
    assert_same(original, file)


@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 2.0, 8.0, 4096)])
def test_llama_3_s_scaling_in_full_size(scaling):
    """The line through the divisors gives back the parameters, those of another context in terms of Llama 3's."""
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 4096}
    metadata |= {"llama.attention.head_count": 32, "llama.rope.freq_base": 5e5}
    divisors = llama3_divisors(128, 5e5, *scaling).astype(np.float64)
    config = read_config(
        metadata, {"token_embd.weight": [8, 4096], "blk.0.attn_q.weight": [1, 1]}, {"rope_freqs.weight": divisors}
    )
    factor, low, high, context = scaling
    wanted = {"factor": factor, "low_freq_factor": low * 8192 / context, "high_freq_factor": high * 8192 / context}
    assert {key: config.rope_parameters[key] for key in wanted} == pytest.approx(wanted, rel=1e-3)


def test_divisors_of_one_scale_nothing(converted):
    assert_same(*converted("llama", tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)}))


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope(converted, partial):
    """As in Phi 3 and 4 of 128k tokens: what counts is the length up to which a text may go."""
    count = int(8 * partial)
    short, long = np.linspace(1, 1.5, count), np.linspace(1, 40, count)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": partial}
    rope |= {"short_factor": short.tolist(), "long_factor": long.tolist()}
    keys = {".rope.scaling.original_context_length": 32, ".rope.scaling.attn_factor": float(np.sqrt(1 + 3 / 5))}
    tensors = {"rope_factors_short.weight": short.astype("f4"), "rope_factors_long.weight": long.astype("f4")}
    changes = {"rope_parameters": rope, "max_position_embeddings": 256, "original_max_position_embeddings": 32}
    original, file = converted("phi3", keys=keys, tensors=tensors, **changes)
    assert file.config.rope_parameters["rope_type"] == "longrope"
    assert_same(original, file)
    with torch.no_grad():
        wanted, found = (source.whole_model()(input_ids=IDS[:, :16]).logits for source in (original, file))
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


def test_longrope_that_is_damaged(converted):
    keys, tensors = {".rope.scaling.original_context_length": 32}, {**LONG}
    tensors["rope_factors_short.weight"] = np.ones(7, dtype=np.float32)
    with pytest.raises(UserError, match="rope_factors_short.weight, which scales the rotary embedding, is missing or"):
        converted("phi3", keys=keys, tensors=tensors)


def test_latent_keys_and_values_of_older_files(converted):
    original, _ = converted("deepseek_v3")
    whole = original.whole_model()
    tensors = {
        f"blk.{index}.attn_kv_b.weight": layer.self_attn.kv_b_proj.weight.detach().numpy()
        for index, layer in enumerate(whole.model.layers)
    }
    keys = {".attention.key_length": 24, ".attention.value_length": 16, ".attention.head_count_kv": 4}
    without = (".attention.key_length_mla", ".attention.value_length_mla")
    assert_same(*converted("deepseek_v3", keys=keys, tensors=tensors, without=without))


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_blocks_with_a_window_have_a_base_of_their_own(converted, base):
    """As Gemma 3 of 4 billion parameters and more, whose other blocks alone are scaled."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": base},
    }
    keys = {".attention.sliding_window_pattern": 2}
    if base != 10_000:
        keys[".rope.freq_base_swa"] = base
    original, file = converted("gemma3_text", keys=keys, rope_parameters=rope, **GEMMA)
    assert file.config.rope_parameters == original.config.rope_parameters
    assert_same(original, file)


def test_a_pattern_for_each_block(converted):
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    keys = {".attention.sliding_window_pattern": [False, True, True, False]}
    original, file = converted("gemma3_text", keys=keys, layer_types=types, **GEMMA)
    assert file.config.layer_types == types
    assert_same(original, file)


@pytest.mark.parametrize("kind, blocks, whole", [("gemma2", 46, 128), ("gemma3", 62, 128), ("gemma3", 34, 256)])
def test_the_largest_gemma_divides_by_the_whole_width(kind, blocks, whole):
    metadata = {"general.architecture": kind, f"{kind}.block_count": blocks, f"{kind}.embedding_length": 4096}
    metadata |= {f"{kind}.attention.{key}": value for key, value in (("head_count", 32), ("key_length", 256))}
    metadata |= {f"{kind}.attention.{key}": value for key, value in (("value_length", 256), ("sliding_window", 64))}
    shapes = {"token_embd.weight": [8, 4096], **{f"blk.{index}.attn_q.weight": [1, 1] for index in range(blocks)}}
    assert read_config(metadata, shapes).query_pre_attn_scalar == whole


CUSTOM = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
LONG = {f"rope_factors_{kind}.weight": np.ones(8, dtype=np.float32) for kind in ("long", "short")}


@pytest.mark.parametrize(
    "family, keys, tensors, says",
    [
        ("llama", {".rope.scaling.type": "longrope"}, {}, "llama.rope.scaling.type is 'longrope'"),
        ("llama", {".rope.scaling.attn_factor": 1.2}, {}, "llama.rope.scaling.attn_factor is 1.2"),
        ("llama", {".rope.scaling.yarn_log_multiplier": 0.1}, {}, "llama.rope.scaling.yarn_log_multiplier is 0.1"),
        ("llama", {".rope.dimension_count": 8}, {}, "llama.rope.dimension_count is 8 where a head has 16"),
        ("llama", {".rope.freq_base_swa": 1e4}, {}, "llama.rope.freq_base_swa is 10000"),
        ("llama", {}, CUSTOM, "rope_freqs.weight in a way of its own"),
        ("llama", {".rope.scaling.factor": 2.0}, CUSTOM, "llama.rope.scaling.type is 'linear' beside rope_freqs"),
        ("llama", {}, LONG, r"two sets of factors \(longrope\)"),
        ("phi3", {}, LONG, r"two sets of factors \(longrope\)"),  # from which length on?
        ("deepseek_v2", {".expert_weights_norm": True}, {}, "deepseek2.expert_weights_norm is True"),
        ("deepseek_v3", {".expert_gating_func": 3}, {}, "deepseek2.expert_gating_func is 3"),
        ("ministral3", {".attention.temperature_scale": 0.0}, {}, "mistral3.rope.scaling.yarn_log_multiplier is 1.0"),
        ("llama", {".attention.value_length": 8}, {}, "llama.attention.value_length is 8"),
        ("llama", {".attention.head_count_kv": [2, 2, 1, 2]}, {}, "head_count_kv differs from block to block"),
        ("llama", {".attention.clamp_kqv": 8.0}, {}, "llama.attention.clamp_kqv is 8.0"),
        ("llama", {".attention.scale": 0.5}, {}, "llama.attention.scale is 0.5"),
        ("llama", {".logit_scale": 0.25}, {}, "llama.logit_scale is 0.25"),
        ("llama", {".residual_scale": 0.25}, {}, "llama.residual_scale is 0.25"),
        ("llama", {".embedding_scale": 12.0}, {}, "llama.embedding_scale is 12.0"),
        ("llama", {".final_logit_softcapping": 30.0}, {}, "llama.final_logit_softcapping is 30.0"),
        ("qwen2", {".expert_count": 8}, {}, "qwen2.expert_count is 8"),
        ("minimax_m2", {".expert_gating_func": 1}, {}, "minimax-m2.expert_gating_func is 1"),
        ("llama", {".some_new_key": True}, {}, "llama.some_new_key is True"),
        ("gemma3_text", {".attn_logit_softcapping": 50.0}, {}, "gemma3.attn_logit_softcapping is 50.0"),
        ("qwen2", {".attention.sliding_window": 8}, {}, "qwen2.attention.sliding_window is 8"),
        ("qwen3_moe", {".expert_weights_scale": 2.5}, {}, "qwen3moe.expert_weights_scale is 2.5"),
        ("bloom", {".attention.head_count_kv": 2}, {}, "bloom.attention.head_count_kv is 2"),
        (
            "llama",
            {},
            {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)},
            "tensor blk.0.attn_q_norm.weight, for",
        ),
        ("llama", {".block_count": 5}, {}, "says that it has 5 blocks, but has the tensors of 4"),
        ("llama", {".block_count": 3}, {}, "says that it has 3 blocks, but has the tensors of 4"),
        ("llama", {".context_length": 2**31}, {}, "llama.context_length is 2147483648: the file is damaged"),
        ("llama", {".attention.head_count": 0}, {}, "llama.attention.head_count is 0"),
        ("llama", {".attention.layer_norm_rms_epsilon": float("nan")}, {}, "rms_epsilon is nan: the file is damaged"),
        ("llama", {".rope.freq_base": "x"}, {}, "llama.rope.freq_base is 'x': the file is damaged"),
        ("llama", {".attention.head_count": 2.5}, {}, "in a way that transformers does not accept"),
        ("phi3", {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}, {}, "phi3.rope.scaling.type is 'yarn'"),
        ("llama", {".embedding_length": 32}, {}, "no table of embeddings as wide as it says"),
        ("llama", {"split.count": 3}, {}, "is one of 3 parts"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(converted, home, family, keys, tensors, says):
    with pytest.raises(UserError, match=says) as refused:
        converted(family, keys=keys, tensors=tensors)
    assert f"{family}.gguf" in str(refused.value)
    assert not [folder for folder in home.rglob("gguf/*") if folder.suffix == "" and folder.is_dir()], "no description"


@pytest.mark.parametrize(
    "keys",
    [
        {".attention.causal": True, ".expert_count": 0, ".logit_scale": 1.0, ".residual_scale": 0.0},
        {".attention.scale": 0.25, ".rope.scaling.attn_factor": 1.0, ".rope.scaling.original_context_length": 64},
        {".attention.head_count_kv": [2, 2, 2, 2], ".attention.sliding_window": 0, "someone.else": 3},
    ],
)
def test_keys_that_change_nothing(converted, keys):
    assert_same(*converted("llama", keys=keys))


def test_a_missing_window_is_refused(converted):
    with pytest.raises(UserError, match="lacks gemma3.attention.sliding_window"):
        converted("gemma3_text", without=(".attention.sliding_window",))


def test_an_unknown_architecture_is_refused(converted, monkeypatch):
    monkeypatch.setitem(write_gguf.__globals__["ARCHITECTURES"], "llama", "deci")
    with pytest.raises(
        UserError, match="architecture deci cannot be read from a GGUF file.*What can be read: bloom, "
    ):
        converted("llama")


def test_a_description_of_another_format_is_not_used(converted, monkeypatch):
    _, first = converted("llama")
    config = Path(first.checkpoint.folder) / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    path = Path(first.checkpoint._path)
    assert open_model(str(path)).config.rms_norm_eps == 0.5, "made once"
    monkeypatch.setattr(gguf_file, "_FORMAT", gguf_file._FORMAT + 1)
    assert open_model(str(path)).config.rms_norm_eps == 1e-6


def test_the_configuration_is_the_original_s(converted):
    original, file = converted("llama")
    wanted, found = (source.config.to_dict() for source in (original, file))
    of_the_text = {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "_name_or_path"}
    assert {key for key in wanted | found if wanted.get(key) != found.get(key)} <= of_the_text
    assert set(hyperparameters(original.config)) >= {"llama.context_length", "llama.rope.freq_base"}
