"""Targets over TransformerLens models, of version 4 (TransformerBridge) and version 3 (HookedTransformer)."""

import copy
import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from saekit.errors import SaekitError, UnknownNameError
from saekit.targets import Side, Site, Target

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is an optional library")
HAS_HOOKED = importlib.util.find_spec("transformer_lens.HookedTransformer") is not None
HAS_NATIVE = importlib.util.find_spec("transformer_lens.model_bridge.sources.native") is not None

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TENSORS = [
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "mlp.hook_post",
    "attn.hook_z",
]


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2))


def tiny_gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(
        **sizes, num_key_value_heads=1, vocab_size=40, max_position_embeddings=32, initializer_range=0.2
    )
    return Gemma2ForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """From disk: TransformerLens looks for the folder that a tokenizer came from."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0")
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token="w0", eos_token="w0", pad_token="w0")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridged(model, tokenizer, tmp_path) -> Target:
    from transformer_lens.model_bridge import TransformerBridge

    wrapped = copy.deepcopy(model)
    return Target.wrap(
        TransformerBridge.boot_transformers(str(tmp_path / "tiny"), hf_model=wrapped, tokenizer=tokenizer, device="cpu")
    )


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma2])
def test_every_name_means_the_same_tensor_on_a_bridge_and_on_the_model_it_wraps(make, tokenizer, tmp_path):
    # both in training mode, dropout and all: a target runs neither so
    model = make().train()
    plain, bridge = Target.wrap(model), bridged(model, tokenizer, tmp_path)
    own = "transformer.h.1" if make is tiny_gpt2 else "model.layers.1"
    sites = [Site("hook_embed"), *(Site(f"blocks.1.{tensor}") for tensor in TENSORS)]
    sites += [
        Site("layers.1"),
        Site(own),
        Site(own, Side.INPUT),
        Site("layers.1.self_attn"),
        Site("layers.1.mlp", Side.INPUT),
    ]
    from_plain, from_bridge = plain.read(IDS, sites), bridge.read(IDS, sites)
    for site in sites:
        torch.testing.assert_close(from_bridge[site], from_plain[site], rtol=1e-4, atol=1e-5, msg=str(site))
    torch.testing.assert_close(bridge.run(IDS), plain.run(IDS), rtol=1e-4, atol=1e-5)
    edit = {Site("blocks.1.hook_mlp_out"): torch.zeros_like}
    torch.testing.assert_close(bridge.run(IDS, edits=edit), plain.run(IDS, edits=edit), rtol=1e-4, atol=1e-5)
    assert (bridge.context, bridge.vocabulary, bridge.width(sites[0])) == (32, 40, 16)
    assert bridge.model.original_model.training


@pytest.mark.skipif(not HAS_NATIVE, reason="needs transformer-lens 4, where models can be made from a config alone")
def test_a_native_bridge_is_read_as_its_own_cache_reads_it():
    import transformer_lens.model_bridge.sources.native  # noqa: F401  attaches boot_native
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_ctx": 16, "d_vocab": 40}
    config = TransformerBridgeConfig(**sizes, act_fn="gelu_new", normalization_type="LN", seed=0)
    check_against_own_cache(TransformerBridge.boot_native(config, device="cpu"))


@pytest.mark.skipif(not HAS_HOOKED, reason="needs transformer-lens 3: version 4 has no HookedTransformer")
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_a_hooked_transformer_is_read_as_its_own_cache_reads_it():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_ctx": 16, "d_vocab": 40}
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="gelu", seed=0))
    check_against_own_cache(model)
    # here the stream itself goes through a submodule, so an edit reaches both of its readers
    mid = "blocks.1.hook_resid_mid"
    want = model.run_with_hooks(IDS, fwd_hooks=[(mid, lambda tensor, hook: tensor * 2)])
    assert torch.equal(Target.wrap(model).run(IDS, edits={Site(mid): lambda tensor: tensor * 2}), want)


def check_against_own_cache(model) -> None:
    target = Target.wrap(model)
    logits, cache = model.run_with_cache(IDS)
    assert torch.equal(target.run(IDS), logits)
    sites = [Site("hook_embed"), *(Site(f"blocks.1.{tensor}") for tensor in TENSORS)]
    for site, tensor in target.read(IDS, sites).items():
        # its own hooks see the heads apart; a plain hook on version 4 sees them side by side
        want = cache[site.module].reshape(tensor.shape) if site.module.endswith("hook_z") else cache[site.module]
        assert torch.equal(tensor, want), site
    for native in ("layers.1", "model.layers.1", "transformer.h.1"):
        after, before = target.read(IDS, [Site(native), Site(native, Side.INPUT)]).values()
        assert torch.equal(after, cache["blocks.1.hook_resid_post"])
        assert torch.equal(before, cache["blocks.1.hook_resid_pre"])
    want = model.run_with_hooks(IDS, fwd_hooks=[("blocks.0.hook_resid_post", lambda tensor, hook: tensor * 0)])
    for spelling in ("blocks.0.hook_resid_post", "layers.0"):
        assert torch.equal(target.run(IDS, edits={Site(spelling): torch.zeros_like}), want)
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post"):
        target.read(IDS, [Site("blocks.2.hook_resid_post")])
    with pytest.raises(UnknownNameError, match=r"layers\.1"):
        target.read(IDS, [Site("layers.2")])
    assert (target.context, target.vocabulary, target.width(Site("blocks.1.mlp.hook_post"))) == (16, 40, 32)


def test_a_bridge_refuses_to_edit_the_stream_where_it_only_sees_it(tokenizer, tmp_path):
    bridge = bridged(tiny_gpt2(), tokenizer, tmp_path)
    with pytest.raises(SaekitError, match="can be read but not edited here"):
        bridge.run(IDS, edits={Site("blocks.1.hook_resid_mid"): torch.zeros_like})
