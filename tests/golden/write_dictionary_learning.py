"""Small random SAEs, written with the classes of dictionary_learning, each with an input, its codes and its output."""

import json
from pathlib import Path

import torch
from case import D_IN, N_FEATURES, K, out_folder, randomise, save_expected, tokens
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

CASES = {
    "AutoEncoder": lambda: AutoEncoder(D_IN, N_FEATURES),
    "AutoEncoderNew": lambda: AutoEncoderNew(D_IN, N_FEATURES),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D_IN, N_FEATURES),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D_IN, N_FEATURES),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, N_FEATURES, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, N_FEATURES, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, N_FEATURES, K, [4, 8]),
}


def write(folder: Path, seed: int, dictionary: torch.nn.Module, *, backup: bool = False) -> None:
    randomise(dictionary, seed)
    if "threshold" in dict(dictionary.named_buffers()):
        dictionary.threshold.fill_(0.4)
    name = type(dictionary).__name__
    trainer = {
        "dict_class": name,
        "activation_dim": D_IN,
        "dict_size": N_FEATURES,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
        **({"k": K} if "TopK" in name else {}),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "ctx_len": 128}}))
    weights = dictionary.state_dict()
    if backup:
        weights = {"step": 7, "ae": weights, "optimizer": {}, "config": trainer, "norm_factor": 2.0}
    torch.save(weights, folder / "ae.pt")
    x = tokens(seed)
    with torch.no_grad():
        if backup:  # a backup's weights are still those of training, for inputs divided by the norm factor
            dictionary.scale_biases(2.0)
        codes = dictionary.encode(x)
        save_expected(folder, x=x, codes=codes, output=dictionary.decode(codes))


if __name__ == "__main__":
    for seed, (name, build) in enumerate(CASES.items()):
        write(out_folder() / name, seed, build())
    write(out_folder() / "backup", 20, CASES["BatchTopKSAE"](), backup=True)
