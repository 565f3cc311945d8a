"""BatchTopK as dictionary_learning trains it, on vectors in a file; run by the Python of its own environment.

    PEER_PYTHON benchmarks/allocation/peer.py VECTORS.npy OUT --features F --k K --batch-tokens N --lr-scale S --seed I

Writes a folder as that library does. The vectors are read once, in order. What its own training script does around the
trainer is done here too: inputs of unit mean squared norm, biases scaled back at the end. Its learning rate is its own;
warm-up, decay and the start of the threshold are the shares of the run that saekit has.
"""
# the peers live in an environment of their own
# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer


def main() -> None:
    options = parse()
    vectors = torch.from_numpy(np.load(options.vectors))
    steps = len(vectors) // options.batch_tokens
    trainer = BatchTopKTrainer(
        steps=steps,
        activation_dim=vectors.shape[1],
        dict_size=options.features,
        k=options.k,
        layer=0,
        lm_name=options.model,
        submodule_name="resid_post",
        warmup_steps=max(1, round(0.05 * steps)),
        decay_start=round(0.5 * steps),
        threshold_start_step=round(0.5 * steps),
        seed=options.seed,
        device="cpu",
    )
    for group in trainer.optimizer.param_groups:
        group["lr"] *= options.lr_scale
    trainer.scheduler.base_lrs = [rate * options.lr_scale for rate in trainer.scheduler.base_lrs]
    scale = float(vectors[: options.sample].square().sum(1).mean().sqrt())
    for step in range(steps):
        trainer.update(step, vectors[step * options.batch_tokens : (step + 1) * options.batch_tokens] / scale)
    trainer.ae.scale_biases(scale)
    options.out.mkdir(parents=True)
    torch.save(trainer.ae.state_dict(), options.out / "ae.pt")
    config = {"trainer": trainer.config, "buffer": {"io": "out", "ctx_len": 256}}
    (options.out / "config.json").write_text(json.dumps(config, default=str))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--sample", type=int, default=32_768, help="vectors that the scale is read off")
    for name in ("features", "k", "batch-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr-scale", type=float, default=1.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
