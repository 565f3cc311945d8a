"""Codes to disk: `write_codes` under a Threshold, beside the encoder product alone on the same batches.

python -m benchmarks.speed.stream [--tokens 16384] [--size 2048x512x32768x32] [--threads 1]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.speed.case import Size, batches
from saekit.codes_file import write_codes
from saekit.sae import SAE
from saekit.selection import MutualChoice
from saekit.training.calibrate import calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--size", type=Size.parse, default=Size(2048, 512, 32_768, 32))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, data = options.size, batches(options.size, "cpu")
    sae = SAE(size.d_model, size.n_features, MutualChoice(size.k))
    sae.rule = calibrate(sae, data[0])
    turns = max(1, options.tokens // size.n_tokens)
    times: dict[str, list[float]] = {"product": [], "write_codes": []}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for turn in range(turns):
            batch = data[turn % len(data)]
            start = time.perf_counter()
            torch.nn.functional.linear(batch, sae.encoder, sae.b_enc)
            middle = time.perf_counter()
            codes = write_codes(sae, [batch], Path(folder) / str(turn))
            times["write_codes"].append(time.perf_counter() - middle)
            times["product"].append(middle - start)
    product, written = min(times["product"]), min(times["write_codes"])
    print(
        f"{size}, {options.threads} threads: product {1e3 * product:.0f} ms, write_codes {1e3 * written:.0f} ms "
        f"({written / product:.2f} x), {size.n_tokens / written:,.0f} tokens/s, {codes.nnz / codes.n_tokens:.1f} active"
    )


if __name__ == "__main__":
    main()
