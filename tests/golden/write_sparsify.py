"""Small random SAEs, written by EleutherAI's sparsify itself, each with an input, its codes and its output."""

import json
from pathlib import Path

import torch
from case import D_IN, K, out_folder, randomise, save_expected, tokens
from sparsify import SparseCoder, SparseCoderConfig

CASES = {
    "topk/layers.5": {},
    "num_latents/layers.5.mlp": {"num_latents": 10, "expansion_factor": 32},
    "groupmax/h.3.attn": {"activation": "groupmax"},
    "transcode/layers.5.mlp": {"transcode": True, "normalize_decoder": False},
    "skip/layers.5.mlp": {"transcode": True, "skip_connection": True},
    "skip_without_transcode/embed_tokens": {"skip_connection": True},
}


def write(folder: Path, seed: int, arguments: dict) -> None:
    config = SparseCoderConfig(**{"k": K, "expansion_factor": 2} | arguments)
    coder = SparseCoder(D_IN, config)
    randomise(coder, seed)
    coder.save_to_disk(folder)
    run = {"model": "EleutherAI/pythia-70m", "dataset": "text", "ctx_len": 64, "sae": config.to_dict()}
    (folder.parent / "config.json").write_text(json.dumps(run))
    x = tokens(seed)
    with torch.no_grad():
        encoded = coder.encode(x)
        codes = torch.zeros(len(x), coder.num_latents).scatter_(1, encoded.top_indices, encoded.top_acts)
        # what `forward` does, which itself asks for a GPU
        output = coder.decode(encoded.top_acts, encoded.top_indices)
        if coder.W_skip is not None:
            output = output + x @ coder.W_skip.mT
    save_expected(folder, x=x, codes=codes, output=output)


if __name__ == "__main__":
    for seed, (name, arguments) in enumerate(CASES.items()):
        write(out_folder() / name, seed, arguments)
