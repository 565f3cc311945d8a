"""What the bundled language model is worth: it, a trigram and lzma on the same held-out source.

    python -m benchmarks.pystd.baselines [--model FOLDER] [--json]

See README.md beside this file for what each number means.
"""

import argparse
import itertools
import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit
from benchmarks.gate import note, tests_pass
from benchmarks.pystd import trigram
from saekit.activations.text import Document, split_documents, stdlib_documents
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.training.pretrain import held_out_nats

BUNDLED = Path(saekit.__file__).parent / "assets" / "pystd"
PROMPTS = ("def __init__(self, ", "for i in ")
NEW_TOKENS = 64
SAMPLING = {"temperature": 0.8, "top_k": 0, "seed": 0}
SHORT_PRIMER = 12_000_000
# the window reaches back over everything that is ever compressed at once
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26}]


def measure(folder: Path) -> dict:
    """All numbers and texts of the report."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = folder / "pretrain.json"
    share = json.loads(settings.read_text())["held_out"] if settings.exists() else 0.05
    train, held_out = split_documents(stdlib_documents(tests=True), held_out=share)
    modules = {document.name for document in stdlib_documents()}
    context = model.config.max_position_embeddings

    note("trigram")
    rows = tokenize_documents(train, tokenizer, context=context)
    counts = trigram.fit(rows.ids.numpy(), len(tokenizer))
    # tests first, so that the modules are what a window of the last megabytes holds
    primer = "".join(d.text for d in sorted(train, key=lambda d: d.name in modules)).encode()
    primers = {"primed_12mb": primer[-SHORT_PRIMER:], "primed_all": primer}
    primer_sizes = {name: compressed(text) for name, text in primers.items()}

    report = {"python": sys.version.split()[0], "model": str(folder), "train_bytes": len(primer), "held_out": {}}
    report["train_tokens"] = rows.ids[:, 1:].numel()
    library = [document for document in held_out if document.name in modules]
    for name, documents in (("library", library), ("library_and_tests", held_out)):
        note(f"held-out {name}")
        rows = tokenize_documents(documents, tokenizer, context=context)
        text = text_of_rows(rows, documents)
        n_tokens = rows.ids[:, 1:].numel()
        in_bits = n_tokens / np.log(2) / len(text)
        of_model = held_out_nats(model, rows)
        of_model_with_context = nats_with_context(model, rows)
        of_trigram = float(trigram.nats(counts, rows.ids.numpy()).mean())
        lzma_sizes = {"alone": compressed(text)}
        for kind, before in primers.items():
            lzma_sizes[kind] = compressed(before + text) - primer_sizes[kind]
        report["held_out"][name] = {
            "documents": len(documents),
            "tokens": n_tokens,
            "bytes": len(text),
            "model": {"nats_per_token": of_model, "bits_per_byte": of_model * in_bits},
            "model_with_context": {
                "nats_per_token": of_model_with_context,
                "bits_per_byte": of_model_with_context * in_bits,
            },
            "trigram": {"nats_per_token": of_trigram, "bits_per_byte": of_trigram * in_bits},
            "lzma": {kind: {"bits_per_byte": size * 8 / len(text)} for kind, size in lzma_sizes.items()},
        }
    report["continuations"] = [continuations(model, tokenizer, prompt) for prompt in PROMPTS]
    return report


@torch.inference_mode()
def nats_with_context(model: torch.nn.Module, rows: TokenRows, *, batch_rows: int = 16) -> float:
    """Mean nats per token over the same tokens, where each has at least half a context before it.

    The rows are joined to the stream that they were cut from; a window of one context slides over it by
    half its length, and only what is new in it counts.
    """
    stream, body = rows.ids[:, 1:].flatten(), rows.ids.shape[1] - 1
    stride = (body + 1) // 2
    ends = [*range(body, len(stream), stride), len(stream)]
    windows = torch.stack([stream[end - body : end] for end in ends])
    windows = torch.cat([rows.ids[:1, :1].expand(len(windows), 1), windows], dim=1)
    new = torch.tensor([body, *(end - before for before, end in itertools.pairwise(ends))])
    is_new = torch.arange(body) >= body - new[:, None]
    total = 0.0
    for part, counted in zip(windows.split(batch_rows), is_new.split(batch_rows), strict=True):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        total += nats[counted].sum().item()
    return total / len(stream)


def text_of_rows(rows: TokenRows, documents: Sequence[Document]) -> bytes:
    """The text behind the rows: all of it but the last few tokens, which did not fill a row."""
    last = int(rows.source.max())
    cut = int(rows.end[rows.source == last].max())
    return "".join([*(document.text for document in documents[:last]), documents[last].text[:cut]]).encode()


def compressed(text: bytes) -> int:
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=FILTERS))


def continuations(model: Any, tokenizer: Any, prompt: str) -> dict[str, str]:
    asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    texts = {"prompt": prompt}
    for name, options in (
        ("greedy", {"do_sample": False}),
        ("sampled", {"do_sample": True, "temperature": SAMPLING["temperature"], "top_k": SAMPLING["top_k"]}),
    ):
        torch.manual_seed(SAMPLING["seed"])
        ids = model.generate(**asked, max_new_tokens=NEW_TOKENS, **options)
        texts[name] = tokenizer.decode(ids[0], skip_special_tokens=True)
    return texts


def table(report: dict) -> str:
    lines = [f"Python {report['python']}, {report['model']}, trained on {report['train_bytes']:,} bytes"]
    for name, part in report["held_out"].items():
        lines.append(f"\n{name}: {part['documents']} documents, {part['tokens']:,} tokens, {part['bytes']:,} bytes")
        lines.append(f"  {'':24}{'nats/token':>12}{'bits/byte':>12}")
        rows = {"model": part["model"], "model with context": part["model_with_context"], "trigram": part["trigram"]}
        rows |= {f"lzma {kind}": numbers for kind, numbers in part["lzma"].items()}
        for label, numbers in rows.items():
            nats = f"{numbers['nats_per_token']:.3f}" if "nats_per_token" in numbers else ""
            lines.append(f"  {label:24}{nats:>12}{numbers['bits_per_byte']:>12.3f}")
    for texts in report["continuations"]:
        for kind in ("greedy", "sampled"):
            lines.append(f"\n--- {texts['prompt']!r}, {kind}\n{texts[kind]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="a Hugging Face folder; the bundled model if not given"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    if not tests_pass(("pystd_baselines", "text", "tokens")):
        sys.exit(1)
    report = measure(options.model)
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
