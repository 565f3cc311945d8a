"""Whether SAELens and sparsify read what saekit wrote: their codes and outputs, for the inputs beside each folder.

Run with an interpreter that has the two; the argument is a folder with `saelens/NAME/` and `sparsify/NAME/`, each
beside a `NAME.safetensors` that holds `x`. Writes `NAME.back.safetensors` and, for SAELens, `NAME.metadata.json`.
"""

import json
from pathlib import Path

import torch
from case import out_folder
from safetensors.torch import load_file, save_file


def read_saelens(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    facts = {"architecture": sae.cfg.architecture(), **sae.cfg.metadata.to_dict()}
    folder.with_name(f"{folder.name}.metadata.json").write_text(json.dumps(facts))
    codes = sae.encode(x)
    return codes.to_dense() if codes.is_sparse else codes, sae(x)


def read_sparsify(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    encoded = coder.encode(x)
    codes = torch.zeros(len(x), coder.num_latents).scatter_(1, encoded.top_indices, encoded.top_acts)
    output = coder.decode(encoded.top_acts, encoded.top_indices)
    return codes, output if coder.W_skip is None else output + x @ coder.W_skip.mT


@torch.no_grad()
def main() -> None:
    for library, read in {"saelens": read_saelens, "sparsify": read_sparsify}.items():
        for folder in sorted(path for path in (out_folder() / library).iterdir() if path.is_dir()):
            x = load_file(folder.with_name(f"{folder.name}.safetensors"))["x"]
            codes, output = read(folder, x)
            save_file({"codes": codes, "output": output}, folder.with_name(f"{folder.name}.back.safetensors"))


if __name__ == "__main__":
    main()
