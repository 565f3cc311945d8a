"""Training the bundled kind of language model, on a few lines of text."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from saekit.activations.text import Document
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, FileError, SaekitError
from saekit.training import pretrain as pretraining
from saekit.training.pretrain import BOS, STATE_FILE, PretrainConfig, build_model, pretrain, train_tokenizer

LINES = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n", "class Thing:\n    pass\n"]
# json and os fall on the held-out side, whatever else there is
DOCUMENTS = [Document(f"m{i}.py", "".join(LINES[(i + j) % 3] for j in range(12))) for i in range(8)]
DOCUMENTS += [Document("json/decoder.py", "".join(LINES) * 5)]
TINY = PretrainConfig(
    vocabulary=300,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_mlp=32,
    context=16,
    tokens=16 * 4 * 30,
    batch_tokens=16 * 4,
    warmup_tokens=16 * 4 * 5,
)


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    def stdlib_documents(*, tests: bool) -> list[Document]:
        assert tests
        return DOCUMENTS

    monkeypatch.setattr(pretraining, "stdlib_documents", stdlib_documents)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300, context=16)


class Stopped(Exception):
    """A power cut."""


def interrupt_at(step: int):
    def on_report(report: dict) -> None:
        if report["step"] == step:
            raise Stopped

    return on_report


def run(config: PretrainConfig, out, **options) -> tuple[dict[str, Tensor], list[dict]]:
    reports: list[dict] = []
    model = pretrain(config, out, on_report=reports.append, **options)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, reports


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_loss_falls_on_seen_and_unseen_text(tmp_path):
    _, reports = run(TINY, tmp_path, save_every=5)
    assert [report["step"] for report in reports] == list(range(1, 31))
    assert reports[-1]["tokens"] == TINY.tokens
    assert reports[0]["loss"] == pytest.approx(5.7, abs=0.3)  # ln 300
    assert reports[-1]["loss"] < 4.2
    held_out = [report["held_out"] for report in reports if "held_out" in report]
    assert len(held_out) == 6 and held_out[-1] < held_out[0] - 1


def test_the_folder_is_a_hugging_face_model_whose_weights_are_the_trained_ones_in_half_precision(tmp_path):
    trained, _ = run(TINY, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = dict(model.named_parameters())
    assert {parameter.dtype for parameter in loaded.values()} == {torch.float32}
    assert_same(loaded, {name: tensor.half().float() for name, tensor in trained.items()})
    on_disk = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.float16}
    assert json.loads((tmp_path / "model" / "pretrain.json").read_text())["d_model"] == 16
    assert (model.config.max_position_embeddings, model.config.vocab_size) == (16, 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("def add(a, b):", return_tensors="pt")["input_ids"]
    assert (int(ids[0, 0]), tokenizer.bos_token, tokenizer.model_max_length) == (model.config.bos_token_id, BOS, 16)
    assert not (tmp_path / "model" / STATE_FILE).exists()
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("stop_at, save_every", [(10, 5), (13, 5), (30, 7)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, stop_at, save_every):
    whole, reports = run(TINY, tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(TINY, tmp_path / "cut", save_every=save_every, on_report=interrupt_at(stop_at))
    assert (tmp_path / "cut" / STATE_FILE).exists()
    assert not list((tmp_path / "cut").glob("*.part"))
    resumed, later = run(TINY, tmp_path / "cut", resume=True, save_every=save_every)
    assert_same(resumed, whole)
    losses = {report["step"]: report["loss"] for report in reports}
    assert all(report["loss"] == losses[report["step"]] for report in later)
    assert not (tmp_path / "cut" / STATE_FILE).exists()


def test_a_length_changed_before_the_fall_begins_is_as_if_it_had_always_been_so(tmp_path):
    longer = replace(TINY, tokens=TINY.tokens * 2)
    whole, _ = run(TINY, tmp_path / "whole")
    with pytest.raises(Stopped):  # the fall begins at step 36 of the longer run, at 18 of the shorter one
        pretrain(longer, tmp_path / "cut", save_every=1, on_report=interrupt_at(15))
    resumed, _ = run(TINY, tmp_path / "cut", resume=True)
    assert_same(resumed, whole)


def test_a_seed_decides_the_weights_and_another_gives_others(tmp_path):
    short = replace(TINY, tokens=TINY.batch_tokens * 3)
    first, _ = run(short, tmp_path / "a")
    assert_same(first, run(short, tmp_path / "b")[0])
    other, _ = run(replace(short, seed=1), tmp_path / "c")
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_learning_rate_is_a_trapezoid():
    config = PretrainConfig(batch_tokens=4096, tokens=4096 * 1000, warmup_tokens=4096 * 50, decay=0.4)
    assert [config.lr_factor(step) for step in (0, 24, 49, 50, 600, 800, 999)] == [0.02, 0.5, 1, 1, 1, 0.5, 1 / 400]


def test_every_epoch_reads_every_whole_batch_once_in_an_order_of_its_own():
    epochs = [torch.cat([pretraining._batch_rows(5 * epoch + i, 4, 22, seed=0) for i in range(5)]) for epoch in (0, 1)]
    assert all(len(epoch.unique()) == 20 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[1][:4], pretraining._batch_rows(5, 4, 22, seed=0))


def test_held_out_loss_is_the_mean_over_rows_whatever_the_batches():
    model = build_model(TINY, bos=0).eval()
    ids = torch.randint(0, 300, (7, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits.detach()
    wanted = torch.nn.functional.cross_entropy(logits[:5, :-1].flatten(0, 1), ids[:5, 1:].flatten())
    got = pretraining.held_out_nats(model, TokenRows.from_ids(ids), max_rows=5, batch_rows=2)
    assert got == pytest.approx(float(wanted), rel=1e-5)


# the tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("")
@example("  leading, double  spaces, \t\r\n and   trailing \n")
@example("e\u0301 \u00e9 \U0001f468\u200d\U0001f469 \x00 猫")
def test_any_text_comes_back_and_bos_stands_in_front(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
    assert max(ids) < len(tokenizer) <= 300


def test_frequent_words_are_one_token(tokenizer):
    assert len(tokenizer("def add return", add_special_tokens=False)["input_ids"]) <= 4


# refusals


def test_resuming_needs_a_state_and_a_state_needs_resuming(tmp_path):
    with pytest.raises(FileError, match=rf"nothing to resume: there is no .*{STATE_FILE}; start without --resume"):
        pretrain(TINY, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Stopped):
        pretrain(TINY, tmp_path / "run", save_every=1, on_report=interrupt_at(2))
    before = (tmp_path / "run" / STATE_FILE).read_bytes()
    with pytest.raises(
        FileError, match=rf"{STATE_FILE} holds an unfinished run; pass --resume to go on, choose another"
    ):
        pretrain(TINY, tmp_path / "run")
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == before


def test_a_state_that_is_damaged_or_of_another_model_is_refused(tmp_path):
    with pytest.raises(Stopped):
        pretrain(TINY, tmp_path, save_every=1, on_report=interrupt_at(2))
    for name, value in {"d_model": 32, "n_layers": 3, "seed": 7, "hidden_lr": 1.0}.items():
        with pytest.raises(FileError, match=rf"{name} = .*, and this one has {value}; resume with the settings it was"):
            pretrain(replace(TINY, **{name: value}), tmp_path, resume=True)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(FileError, match=f"{STATE_FILE} does not fit this config, or is damaged"):
        pretrain(TINY, tmp_path, resume=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": 63}, "tokens=63 is less than one batch of 64; raise tokens, or lower batch_tokens"),
        ({"batch_tokens": 15}, "a batch of 15 tokens is less than one row of 16; raise batch_tokens, or lower context"),
        ({"vocabulary": 256}, "vocabulary=256 cannot hold every byte and BOS; give at least 257"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused_when_it_is_made(changes, message):
    with pytest.raises(SaekitError, match=message):
        replace(TINY, **changes)


def test_less_text_than_one_batch_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows of 16 tokens, but a batch takes 1,000; lower batch_tokens"):
        pretrain(replace(TINY, batch_tokens=16_000, tokens=16_000), tmp_path)


def test_a_torch_without_the_optimiser_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SaekitError, match=r"pretraining needs torch\.optim\.Muon, and torch .* has none; install 2\.9"):
        pretrain(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()
