"""Sites: the string form, and finding the submodule in every spelling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from saekit.errors import SaekitError, UnknownNameError
from saekit.targets import Side, Site

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32, "num_key_value_heads": 1}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, vocab_size=40)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**LLAMA, pad_token_id=0, eos_token_id=0)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=3, n_head=2, vocab_size=40)),
}


@pytest.fixture(scope="module")
def model_of():
    """Models by name, each made once: names do not depend on weights."""
    made: dict[str, nn.Module] = {}
    return lambda name: made.setdefault(name, MODELS[name]()) if name not in made else made[name]


PART = st.text("abz09_-é", min_size=1, max_size=6)
SITES = st.builds(
    Site,
    module=st.lists(PART, min_size=1, max_size=4).map(".".join),
    side=st.sampled_from(Side),
    call=st.none() | st.integers(0, 10**6),
)


@given(SITES)
def test_parse_is_the_inverse_of_str(site):
    assert Site.parse(str(site)) == site


@given(st.lists(SITES))
def test_sites_of_every_kind_can_be_sorted(sites):
    calls = {site: -1 if site.call is None else site.call for site in sites}
    assert sorted(sites) == sorted(sites, key=lambda site: (site.module, site.side.value, calls[site]))


@pytest.mark.parametrize(
    "text, site, written",
    [
        ("layers.6", Site("layers.6"), "layers.6:out"),
        ("layers.6.mlp:in", Site("layers.6.mlp", Side.INPUT), "layers.6.mlp:in"),
        ("layers.6.mlp:out@2", Site("layers.6.mlp", Side.OUTPUT, 2), "layers.6.mlp:out@2"),
        ("layers.6@0", Site("layers.6"), "layers.6:out"),
        ("core:in@*", Site("core", Side.INPUT, None), "core:in@*"),
        ("blocks.6.hook_resid_post", Site("blocks.6.hook_resid_post"), "blocks.6.hook_resid_post:out"),
    ],
)
def test_what_a_spelling_means_and_how_it_is_written(text, site, written):
    assert Site.parse(text) == site
    assert str(site) == written


BAD_SPELLINGS = [
    "layers.3:up",
    "layers.3@x",
    "layers.3@-1",
    "layers.3@2:in",
    "layers..3",
    "",
    ":in",
    "layers 3",
    "a:",
    "a@",
    "a\n",
]


@pytest.mark.parametrize("text", BAD_SPELLINGS)
def test_a_bad_spelling_is_refused_with_a_good_one(text):
    with pytest.raises(SaekitError, match=r"expected a submodule, then :in or :out.*layers\.6:out@2") as caught:
        Site.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("module, call", [("layers:3", 0), ("", 0), ("a", -1)])
def test_a_site_that_could_not_be_read_back_cannot_be_made(module, call):
    with pytest.raises(SaekitError, match="expected a submodule"):
        Site(module, Side.OUTPUT, call)


@pytest.mark.parametrize(
    "name, spelling, own",
    [
        ("llama", "model.layers.1", "model.layers.1:out"),
        ("llama", "layers.1", "model.layers.1:out"),
        ("llama", "blocks.1.hook_resid_post", "model.layers.1:out"),
        ("llama", "blocks.1.hook_out", "model.layers.1:out"),
        ("llama", "blocks.1.hook_resid_pre", "model.layers.1:in"),
        ("llama", "blocks.1.hook_resid_mid", "model.layers.1.post_attention_layernorm:in"),
        ("llama", "blocks.1.hook_attn_out", "model.layers.1.self_attn:out"),
        ("llama", "blocks.1.hook_mlp_out", "model.layers.1.mlp:out"),
        ("llama", "blocks.1.mlp.hook_in", "model.layers.1.mlp:in"),
        ("llama", "blocks.1.mlp.hook_post", "model.layers.1.mlp.down_proj:in"),
        ("llama", "blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj:in"),
        ("llama", "hook_embed", "model.embed_tokens:out"),
        ("llama", "h.1.attn:in@2", "model.layers.1.self_attn:in@2"),
        ("llama", "layers.1.mlp:in@*", "model.layers.1.mlp:in@*"),
        ("llama", "down_proj", None),
        ("gpt2", "layers.1", "transformer.h.1:out"),
        ("gpt2", "h.1", "transformer.h.1:out"),
        ("gpt2", "model.layers.1.self_attn", "transformer.h.1.attn:out"),
        ("gpt2", "blocks.1.hook_resid_mid", "transformer.h.1.ln_2:in"),
        ("gpt2", "blocks.1.mlp.hook_in", "transformer.h.1.mlp:in"),
        ("gpt2", "blocks.1.mlp.hook_post", "transformer.h.1.mlp.c_proj:in"),
        ("gpt2", "hook_embed", "transformer.wte:out"),
        ("gpt2", "lm_head", "lm_head:out"),
        ("neox", "layers.1", "gpt_neox.layers.1:out"),
        ("neox", "blocks.1.hook_attn_out", "gpt_neox.layers.1.attention:out"),
        # Gemma also norms what it adds to the stream; OLMo 2 norms nothing else
        ("gemma2", "blocks.1.hook_attn_out", "model.layers.1.post_attention_layernorm:out"),
        ("gemma2", "blocks.1.hook_resid_mid", "model.layers.1.pre_feedforward_layernorm:in"),
        ("gemma2", "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm:out"),
        ("olmo2", "blocks.1.hook_resid_mid", "model.layers.1.mlp:in"),
    ],
)
def test_every_spelling_finds_the_models_own_name(model_of, name, spelling, own):
    model = model_of(name)
    if own is None:
        with pytest.raises(
            SaekitError, match=r"the end of 3 submodule names \(model\.layers\.0.*give more of the name"
        ):
            Site.parse(spelling).resolve(model)
    else:
        assert str(Site.parse(spelling).resolve(model)) == own


@pytest.mark.parametrize(
    "name, wrong, right",
    [
        ("llama", "model.layers.2.mpl", "model.layers.2.mlp"),
        ("llama", "layers.2.mpl", "layers.2.mlp"),
        ("llama", "layers.3", "layers.2"),
        ("llama", "blocks.3.hook_resid_post", "blocks.2.hook_resid_post"),
        ("llama", "blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"),
        ("llama", "hook_embde", "hook_embed"),
        ("gpt2", "h.3", "h.2"),
        ("gpt2", "layers.2.self_atn", "layers.2.attn"),
        ("gpt2", "lm_haed", "lm_head"),
    ],
)
def test_a_wrong_name_suggests_right_ones_that_work(model_of, name, wrong, right):
    with pytest.raises(UnknownNameError, match="no submodule named") as caught:
        Site.parse(wrong).resolve(model_of(name))
    suggestions = str(caught.value).split(": ", 1)[1].split(", ")
    assert right in suggestions
    for suggestion in suggestions:
        Site.parse(suggestion).resolve(model_of(name))


@pytest.mark.parametrize(
    "name, spelling",
    [
        ("neox", "blocks.1.hook_resid_mid"),  # attention and MLP side by side: there is no such tensor
        ("bloom", "blocks.1.hook_attn_out"),  # these submodules add the stream to their own output
        ("bloom", "blocks.1.hook_mlp_out"),
    ],
)
def test_a_tensor_that_the_model_does_not_compute_is_refused_rather_than_approximated(model_of, name, spelling):
    with pytest.raises(SaekitError, match=r"has no counterpart in \w+, .* read the block's :in or :out"):
        Site.parse(spelling).resolve(model_of(name))


def test_two_stacks_of_blocks_have_no_layer_1():
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=40))
    with pytest.raises(UnknownNameError):
        Site("layers.1").resolve(model)
    assert str(Site("decoder.block.1").resolve(model)) == "decoder.block.1:out"


def test_the_list_of_blocks_is_not_confused_with_a_list_inside_a_block_or_beside_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Linear(2, 2)
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.stack = nn.ModuleList(Block() for _ in range(3))
    assert str(Site("layers.2").resolve(model)) == "stack.2:out"
    with pytest.raises(UnknownNameError):
        Site("layers.3").resolve(model)


def test_a_module_under_two_names_is_one_module():
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(2, 2))
    model.second = model.first
    assert Site("second.0").resolve(model).module == "second.0"
    end = Site("0").resolve(model)
    assert model.get_submodule(end.module) is model.first[0]
    assert torch.equal(model.get_submodule(end.module).weight, model.second[0].weight)
