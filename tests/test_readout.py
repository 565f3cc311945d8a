"""What directions of the residual stream do to logits, by the model's own norm and embedding, for many families."""

import pytest
import torch
from small_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from saekit.targets import Site
from saekit.targets.readout import find_final_norm, find_head, is_in_stream, stream_to_logits

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}


def gemma() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, num_key_value_heads=1, head_dim=8))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    )  # fmt: skip


FAMILIES = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "gemma 2": gemma,
    "olmo 2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES, **HEADS)),
    "opt": opt,
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, **HEADS)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **HEADS)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_matrix_makes_the_logits_of_the_model_up_to_one_scale(family, dtype):
    model = FAMILIES[family]().eval()
    norm, head = find_final_norm(model), find_head(model)
    assert norm is not None and head is not None
    with torch.no_grad():  # weights that no family starts with, so that each must be applied as the model applies it
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
        head.weight.add_(torch.linspace(-1, 1, 16))
        width = head.weight.shape[1]
        x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)) * 3 + 1
        logits = (head(norm(x)) - head(norm(-x))) / 2  # without the biases of norm and head
    matrix = stream_to_logits(model.to(dtype), width)
    assert matrix is not None and matrix.dtype is torch.float32
    said = x @ matrix.T
    scale = (logits * said).sum(-1, keepdim=True) / said.square().sum(-1, keepdim=True)
    assert bool((scale > 0).all())
    near = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(said * scale, logits, **near)


def test_there_is_no_matrix_where_there_is_no_way_to_tell():
    model = tiny_llama()
    assert stream_to_logits(model, 12) is None  # another width
    assert stream_to_logits(nn.Linear(16, 16), 16) is None
    del model.model.norm
    assert stream_to_logits(model, 16) is None


@pytest.mark.parametrize(
    "family, site, is_in",
    [
        ("llama", "layers.1", True),
        ("llama", "layers.1:in", True),
        ("llama", "embed_tokens", True),
        ("llama", "model.norm:in", True),
        ("llama", "model.norm", False),
        ("llama", "layers.1.self_attn", True),
        ("llama", "layers.1.self_attn.o_proj", True),
        ("llama", "layers.1.self_attn.q_proj", False),
        ("llama", "layers.1.mlp", True),
        ("llama", "layers.1.mlp:in", False),
        ("llama", "layers.1.mlp.down_proj", True),
        ("llama", "layers.1.mlp.up_proj", False),
        ("llama", "layers.1.post_attention_layernorm:in", True),
        ("llama", "layers.1.post_attention_layernorm", False),
        ("llama", "blocks.1.hook_resid_mid", True),
        ("llama", "blocks.1.hook_mlp_out", True),
        ("gpt2", "blocks.1.hook_attn_out", True),
        ("gpt2", "h.1.ln_2:in", True),
        ("gpt2", "h.1.mlp.c_proj", True),
        ("gpt2", "h.1.mlp.c_fc", False),
        ("gpt2", "transformer.wte", True),
        ("gemma 2", "layers.1", True),
        ("gemma 2", "layers.1.mlp", False),  # is normed before it is added
        ("gemma 2", "layers.1.post_feedforward_layernorm", True),
        ("gemma 2", "layers.1.post_attention_layernorm", True),
        ("gemma 2", "layers.1.post_attention_layernorm:in", False),
        ("gemma 2", "layers.1.pre_feedforward_layernorm:in", True),
        ("olmo 2", "layers.1.mlp", False),  # likewise, and is given the stream itself
        ("olmo 2", "layers.1.mlp:in", True),
        ("olmo 2", "layers.1.mlp.down_proj", False),
        ("olmo 2", "layers.1.post_feedforward_layernorm", True),
        ("olmo 2", "layers.1.post_attention_layernorm:in", False),
        ("opt", "layers.1.fc2", True),
        ("opt", "layers.1.fc1", False),
        ("mamba", "layers.1.mixer", True),
        ("neox", "layers.1.attention.dense", True),
    ],
)
def test_a_site_stands_in_the_stream_if_what_it_has_is_added_as_it_is(family, site, is_in):
    assert is_in_stream(FAMILIES[family](), Site.parse(site)) is is_in
