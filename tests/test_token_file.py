"""Token ids from a file: read as they are, or refused in one line."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from saekit.activations.corpus import load_corpus, load_rows
from saekit.activations.mask import MaskPolicy
from saekit.errors import DataError, FileError, SaekitError
from saekit.patching import TokenMask
from saekit.targets import Target


def tokenizer_of(**special: str) -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w9")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


TOKENIZER = tokenizer_of(bos_token="w0", eos_token="w0", pad_token="w1")
IDS = np.random.default_rng(0).integers(0, 40, (10, 6))
IDS[IDS == 1] = 2
PADDED_FIRST = IDS.copy()
PADDED_FIRST[3, :2] = 1


def rows_of(path, array, **options):
    np.save(path / "ids.npy", array)
    return load_rows(str(path / "ids.npy"), TOKENIZER, **{"context": 5, **options})


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.uint8, np.dtype(">i4")], ids=str)
def test_a_rectangle_is_read_as_it_is(tmp_path, dtype):
    rows, documents = rows_of(tmp_path, IDS.astype(dtype))
    assert torch.equal(rows.ids, torch.from_numpy(IDS))
    assert (rows.bos, rows.pad, rows.names, documents) == (0, 1, (), ())
    assert (rows.source == -1).all()


def test_a_flat_array_is_cut_like_text(tmp_path):
    rows, _ = rows_of(tmp_path, IDS.flatten())
    assert torch.equal(rows.ids[:, 1:].flatten(), torch.from_numpy(IDS.flatten()))
    assert (len(rows), rows.context) == (15, 5) and not rows.ids[:, 0].any()
    rows, _ = rows_of(tmp_path, IDS.flatten()[:58], row_bos=False)
    assert torch.equal(rows.ids.flatten(), torch.from_numpy(IDS.flatten()[:55]))


@pytest.mark.parametrize("shared", ["bos_token", "eos_token", "unk_token"])
def test_padding_is_known_only_by_a_token_of_its_own(tmp_path, shared):
    np.save(tmp_path / "ids.npy", IDS)
    tokenizer = tokenizer_of(pad_token="w2", **{shared: "w2"})
    assert load_rows(str(tmp_path / "ids.npy"), tokenizer, context=5)[0].pad is None
    # nor do interventions take for padding what training has read
    assert TokenMask.of(Target.wrap(nn.Identity(), tokenizer), MaskPolicy()).pad is None
    assert TokenMask.of(Target.wrap(nn.Identity(), TOKENIZER), MaskPolicy()).pad == 1


def test_padding_at_the_end_of_rows_is_read(tmp_path):
    padded = IDS.copy()
    padded[3, 2:] = 1
    assert torch.equal(rows_of(tmp_path, padded)[0].ids, torch.from_numpy(padded))


def test_the_last_rows_are_held_out(tmp_path):
    np.save(tmp_path / "ids.npy", IDS)
    corpus = load_corpus(str(tmp_path / "ids.npy"), TOKENIZER, context=5, held_out_rows=3)
    assert torch.equal(corpus.train.ids, torch.from_numpy(IDS[:7]))
    assert torch.equal(corpus.held_out.ids, torch.from_numpy(IDS[7:]))
    assert corpus.train_documents == corpus.held_out_documents == ()


@pytest.mark.parametrize(
    "array, options, message",
    [
        (IDS.astype(float), {}, "holds float64 of shape (10, 6); expected integers, (rows, context) or one flat array"),
        (IDS > 3, {}, "holds bool of shape (10, 6); expected integers"),
        (IDS[None], {}, "holds int64 of shape (1, 10, 6); expected integers"),
        (np.array(3), {}, "holds int64 of shape (); expected integers"),
        (np.array([[1, 2], [3]], dtype=object), {}, "expected integers saved by numpy.save, all rows of one length"),
        (IDS[:0], {}, "ids.npy is empty (shape (0, 6)); save at least one row of token ids"),
        (np.array([], dtype=int), {}, "ids.npy is empty (shape (0,))"),
        (IDS - 1, {}, "holds ids from -1 to 38, but the model knows 0 to 39; tokenise the text with the model's own"),
        (IDS + 1, {}, "holds ids from 1 to 40, but the model knows 0 to 39"),
        (IDS, {"vocabulary": 39}, "holds ids from 0 to 39, but the model knows 0 to 38"),
        (IDS, {"longest": 5}, "has rows of 6 ids, but the model reads at most 5; save shorter rows, or one flat array"),
        (IDS.flatten()[:3], {}, "has 3 token ids, which is less than one context of 5; give more text or a smaller"),
        (IDS.flatten(), {"context": 1}, "less than one context of 1"),
        (PADDED_FIRST, {}, "row 3 has padding (id 1) at position 1 and a token behind it, which would attend"),
        (IDS, {"max_documents": 3}, "has rows of ids, not documents; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, array, options, message):
    with pytest.raises(SaekitError) as error:
        rows_of(tmp_path, array, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_model_decides_which_ids_there_are_not_the_tokenizer(tmp_path):
    assert int(rows_of(tmp_path, IDS + 5, vocabulary=64)[0].ids.max()) == 44


def test_a_file_that_is_missing_cut_short_or_something_else_is_refused(tmp_path):
    path = tmp_path / "ids.npy"
    with pytest.raises(FileError, match=r"no token ids at .*ids\.npy; give a \.npy file that exists"):
        load_rows(str(path), TOKENIZER, context=5)
    np.save(path, IDS)
    for contents in (path.read_bytes()[:-10], path.read_bytes()[:30], b"", b"not an array", b"PK\x03\x04" + bytes(60)):
        path.write_bytes(contents)
        with pytest.raises((FileError, DataError), match=r"cannot read .*ids\.npy") as error:
            load_rows(str(path), TOKENIZER, context=5)
        assert "\n" not in str(error.value)
