"""A language model of twelve words in a folder, a text of them, and the command that trains an SAE on both."""

from pathlib import Path

import pytest
import torch

from saekit.activations.text import Document
from saekit.training.pretrain import PretrainConfig, build_model, train_tokenizer

WORDS = ["the", "small", "model", "reads", "a", "few", "words", "and", "counts", "them", "again", "slowly"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model that has learnt a little, its tokenizer, and a text that fits them."""
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (6000,), generator=generator).tolist()
    text = " ".join(WORDS[i] for i in picks)
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([Document("text", text)], 280, 32)
    config = PretrainConfig(
        vocabulary=280,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_mlp=32,
        context=32,
        tokens=64,
        batch_tokens=64,
    )
    model = build_model(config, tokenizer.bos_token_id)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        start = 128 * (step % 20)
        rows = ids[start : start + 128].view(4, 32)
        logits = model(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def train_arguments(place: Path, out: Path, *more: str) -> list[str]:
    site = [] if "--site" in more else ["--site", "layers.1"]  # takes several values, and so is given once
    return [
        "train", str(place / "model"), str(place / "text.txt"), *site, "--k", "4", "--features", "64",
        "--tokens", "4096", "--batch-tokens", "256", "--held-out-rows", "20", "--out", str(out), *more,
    ]  # fmt: skip
