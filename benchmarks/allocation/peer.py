"""BatchTopK as dictionary_learning trains it, on vectors in a file; run by the Python of its own environment.

    PEER_PYTHON benchmarks/allocation/peer.py VECTORS.npy OUT --features F --k K --batch-tokens N --seed I \
        --learning-rate R --dead-after T

Writes a folder as that library does, and prints as JSON what training took, without the start of Python and libraries:
processor seconds, and memory before and at its highest. The vectors are read once, in order. What its own training
script does around the trainer is done here too: inputs of unit mean squared norm, biases scaled back at the end. The
learning rate, the tokens after which a silent feature counts as dead, and the shares of the run that warm-up, decay and
the threshold take are what all rules have: what the library itself proposes is meant for runs of hundreds of millions
of tokens.
"""
# the peers live in an environment of their own
# pyright: reportMissingImports=false

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from process_memory import forget_peak, memory_mb  # beside this script


def main() -> None:
    options = parse()
    vectors = np.load(options.vectors, mmap_mode="r")
    forget_peak()
    start_mb, began = memory_mb("VmRSS"), time.process_time()
    steps = len(vectors) // options.batch_tokens
    trainer = BatchTopKTrainer(
        steps=steps,
        activation_dim=vectors.shape[1],
        dict_size=options.features,
        k=options.k,
        lr=options.learning_rate,
        layer=0,
        lm_name=options.model,
        submodule_name="resid_post",
        warmup_steps=max(1, round(0.05 * steps)),
        decay_start=round(0.5 * steps),
        threshold_start_step=round(0.5 * steps),
        seed=options.seed,
        device="cpu",
    )
    trainer.dead_feature_threshold = options.dead_after
    scale = float(torch.tensor(vectors[: options.sample]).square().sum(1).mean().sqrt())
    for step in range(steps):
        batch = torch.tensor(vectors[step * options.batch_tokens : (step + 1) * options.batch_tokens])
        trainer.update(step, batch / scale)
    trainer.ae.scale_biases(scale)
    took = {"cpu_s": time.process_time() - began, "start_mb": start_mb, "peak_mb": memory_mb("VmHWM")}
    options.out.mkdir(parents=True)
    torch.save(trainer.ae.state_dict(), options.out / "ae.pt")
    config = {"trainer": trainer.config, "buffer": {"io": "out", "ctx_len": 256}}
    (options.out / "config.json").write_text(json.dumps(config, default=str))
    print(json.dumps(took))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--sample", type=int, default=32_768, help="vectors that the scale is read off")
    for name in ("features", "k", "batch-tokens", "dead-after", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
