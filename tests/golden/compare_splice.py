"""Is a splice of ours the same as SAELens' own, on the same TransformerLens model with the same SAE?

Run with an interpreter that has SAELens and TransformerLens 3; saekit is read from the repository. For three kinds of
SAE, with and without the error term, logits and every cache entry are compared, plain and with a feature ablated.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sae_lens import SAE, HookedSAETransformer, JumpReLUSAEConfig, StandardSAEConfig, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

import saekit
from saekit.activations.mask import MaskPolicy
from saekit.patching import Intervention, Zero, run_with_cache_with_saes, run_with_interventions

WIDTH, FEATURES, HOOK = 32, 96, "blocks.1.hook_resid_post"
KINDS = {"standard": StandardSAEConfig, "topk": TopKSAEConfig, "jumprelu": JumpReLUSAEConfig}
ENTRIES = ("input", "acts_pre", "acts_post", "recons", "error", "output")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def model() -> HookedSAETransformer:
    sizes = {"d_model": WIDTH, "n_layers": 3, "n_heads": 2, "d_head": 16, "d_mlp": 64, "n_ctx": 32, "d_vocab": 50}
    return HookedSAETransformer(HookedTransformerConfig(**sizes, act_fn="gelu_new", seed=0))


def sae_of(kind: str) -> SAE:
    more = {"k": 8} if kind == "topk" else {}
    metadata = SAEMetadata(model_name="none", hook_name=HOOK)
    sae = SAE.from_dict(KINDS[kind](d_in=WIDTH, d_sae=FEATURES, metadata=metadata, **more).to_dict())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sae.named_parameters():
        scale = 0.3 if name in ("W_enc", "W_dec") else 0.05
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = drawn.abs() if name == "threshold" else drawn
    return sae


@torch.no_grad()
def compare(kind: str, use_error_term: bool) -> int:
    """How many tensors agree.

    Raises:
        AssertionError: naming the first that does not.
    """
    lens, theirs = model(), sae_of(kind)
    ids = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_model(folder)
        ours = saekit.load(folder)
    mask = MaskPolicy(drop_bos=False, drop_padding=False)
    target = saekit.Target.wrap(lens)
    logits, cache = run_with_cache_with_saes(target, ids, [ours], use_error_term=use_error_term, mask=mask)
    want, their_cache = lens.run_with_cache_with_saes(ids, saes=[theirs], use_error_term=use_error_term)
    torch.testing.assert_close(logits, want, **TOLERANCE, msg=lambda m: f"{kind}, logits: {m}")
    compared = 1
    for name in ENTRIES:
        if name == "error" and not use_error_term:
            continue
        key = f"{HOOK}.hook_sae_{name}"
        torch.testing.assert_close(cache[key], their_cache[key], **TOLERANCE, msg=lambda m, k=key: f"{kind}, {k}: {m}")
        compared += 1
    feature = int(cache[f"{HOOK}.hook_sae_acts_post"].flatten(0, 1).sum(0).argmax())
    edit = Intervention(site=saekit.Site.parse(HOOK), operation=Zero(), features=(feature,))
    got = run_with_interventions(target, ids, [edit], [ours], use_error_term=use_error_term, mask=mask)

    def ablate(acts, hook):
        acts[..., feature] = 0
        return acts

    lens.add_sae(theirs, use_error_term=use_error_term)
    want = lens.run_with_hooks(ids, fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", ablate)])
    torch.testing.assert_close(got, want, **TOLERANCE, msg=lambda m: f"{kind}, feature {feature} ablated: {m}")
    assert (got - logits).abs().max() > 1e-3, "the ablation changed nothing, so it compares nothing"
    return compared + 1


if __name__ == "__main__":
    for kind in KINDS:
        for use_error_term in (True, False):
            n = compare(kind, use_error_term)
            term = "with" if use_error_term else "without"
            sys.stdout.write(f"{kind}, {term} the error term: {n} tensors equal\n")
