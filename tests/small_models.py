"""Small models and SAEs that the tests of patching share."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from saekit.patching import TokenMask
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import TopK
from saekit.targets import Site

BOS, PAD, WIDTH = 0, 1, 16
IDS = torch.tensor([[0, 9, 8, 7, 6], [0, 5, 4, 3, 2]])
FIRST, SECOND = Site("layers.0"), Site("layers.1")
TOKENS = TokenMask(bos=BOS, pad=PAD)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32, bos_token_id=BOS, eos_token_id=None, pad_token_id=PAD, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=BOS, eos_token_id=None, pad_token_id=PAD, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def bridge():
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens is an optional library")
    import transformer_lens.model_bridge.sources.native  # noqa: F401  attaches boot_native
    from transformer_lens import TransformerBridgeConfig

    sizes = {"d_model": WIDTH, "n_layers": 3, "n_heads": 2, "d_head": 8, "d_mlp": 32, "n_ctx": 16, "d_vocab": 40}
    config = TransformerBridgeConfig(**sizes, act_fn="gelu_new", normalization_type="LN", seed=0)
    return lens.TransformerBridge.boot_native(config, device="cpu")


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bridge": bridge}


def sae_of(rule=None, *, seed: int = 0, n_features: int = 48, **cfg) -> SAE:
    sae = SAE(WIDTH, n_features, rule or TopK(4), cfg=SAEConfig(d_in=WIDTH, d_sae=n_features, **cfg))
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(generator)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=generator)
    return sae


class Loop(nn.Module):
    """One block run three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.core(x).tanh()
        return self.head(x)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
