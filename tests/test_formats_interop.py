"""SAELens and sparsify read what saekit wrote for them. Needs `.venv-interop`, which `make interop` sets up."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saekit.loading import convert
from saekit.normalisation import ConstantNorm, LayerNorm
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import AbsTopK, GroupMax, MutualChoice, Threshold, TopK
from saekit.training.calibrate import calibrate

pytestmark = pytest.mark.interop

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS = REPOSITORY / ".venv-interop" / "bin" / "python"
D_IN, F = 6, 12
TRANSCODER = {"apply_b_dec_to_input": False, "hook_name_out": "blocks.3.hook_mlp_out"}


def random_sae(rule, *, skip=False, seed=0, **cfg) -> SAE:
    sae = SAE(D_IN, F, rule, skip=skip, cfg=SAEConfig(d_in=D_IN, d_sae=F, **{"hook_name": "layers.3"} | cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return sae


def inputs() -> torch.Tensor:
    return torch.randn(32, D_IN, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def saes() -> Iterator[tuple[str, str, SAE]]:
    mutual = random_sae(MutualChoice(3))
    yield "saelens", "topk", random_sae(TopK(3))
    yield "saelens", "abstopk", random_sae(AbsTopK(3))
    yield "saelens", "topk_layer_norm", random_sae(TopK(3), normalisation=LayerNorm())
    yield "saelens", "jumprelu_constant_norm", random_sae(Threshold(0.3), normalisation=ConstantNorm())
    yield "saelens", "jumprelu", random_sae(Threshold(torch.linspace(0, 1, F)), apply_b_dec_to_input=False)
    yield "saelens", "mutual_choice", mutual.with_rule(calibrate(mutual, inputs()))
    yield "saelens", "transcoder", random_sae(Threshold(0.3), d_out=D_IN, **TRANSCODER)
    yield "saelens", "skip_transcoder", random_sae(Threshold(0.3), d_out=D_IN, skip=True, **TRANSCODER)
    yield "sparsify", "topk", random_sae(TopK(3))
    yield "sparsify", "groupmax", random_sae(GroupMax(3))
    yield "sparsify", "skip", random_sae(TopK(3), d_out=D_IN, skip=True, **TRANSCODER)


SAES = {(library, name): sae for library, name, sae in saes()}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory) -> Path:
    """Everything written once, and read by the other libraries in one process of their own."""
    if not PEERS.exists():
        pytest.fail(f"no {PEERS}; run `make interop`")
    folder = tmp_path_factory.mktemp("interop")
    for (library, name), sae in SAES.items():
        convert(sae, folder / library / name, to=library)
        save_file({"x": inputs()}, folder / library / f"{name}.safetensors")
    script = REPOSITORY / "tests" / "golden" / "read_back.py"
    done = subprocess.run([PEERS, "-W", "ignore", script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("library, name", SAES)
def test_the_other_library_gives_the_same_codes_and_output(library, name, read_back):
    theirs, sae = load_file(read_back / library / f"{name}.back.safetensors"), SAES[library, name]
    with torch.no_grad():
        codes = sae.encode(inputs())
        torch.testing.assert_close(theirs["codes"], codes.to_dense(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs["output"], sae.decode(codes, inputs()), atol=1e-5, rtol=1e-5)


def test_saelens_keeps_what_the_sae_belongs_to(read_back):
    facts = json.loads((read_back / "saelens" / "topk.metadata.json").read_text())
    assert facts["hook_name"] == "blocks.3.hook_resid_post"
    assert facts["hf_hook_name"] == "layers.3"
