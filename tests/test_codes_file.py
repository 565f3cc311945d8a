"""Codes that went through a file are the codes that the SAE made, and a damaged file says so."""

import json

import pytest
import torch

from saekit.codes_file import CodesFile, write_codes
from saekit.errors import FileError, ShapeError
from saekit.sae import SAE
from saekit.selection import SelectionRule, Threshold, TopK


def random_sae(rule: SelectionRule, n_features: int = 40) -> SAE:
    sae = SAE(6, n_features, rule)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-1, 1, n_features))
    return sae


def vectors(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n_features", [40, (1 << 16) + 8])
@pytest.mark.parametrize("rule", [TopK(3), Threshold(1.5), Threshold(1e9)], ids=["topk", "threshold", "empty"])
def test_codes_come_back_as_they_were_made(rule, n_features, tmp_path):
    sae, x = random_sae(rule, n_features), vectors()
    written = write_codes(sae, x.split(16), tmp_path / "codes")
    want = sae.encode(x)
    assert written == CodesFile.open(tmp_path / "codes")
    assert (written.n_tokens, written.n_features, written.nnz) == (50, n_features, len(want.values))
    for start, stop in [(0, 50), (7, 33), (16, 16), (48, 99), (50, 50)]:
        got, part = written.rows(start, stop), want.select(torch.arange(50)[start:stop])
        assert torch.equal(got.features, part.features) and torch.equal(got.row_starts, part.row_starts)
        torch.testing.assert_close(got.values, part.values.detach())
    bytes_per_entry = 4 + (2 if n_features <= 1 << 16 else 4)
    arrays = [path for path in (tmp_path / "codes").iterdir() if path.suffix != ".json"]
    assert sum(path.stat().st_size for path in arrays) == bytes_per_entry * written.nnz + 8 * 51


def test_contents_that_no_sae_has_written_are_refused(tmp_path):
    written = write_codes(random_sae(TopK(3), 40), vectors().split(16), tmp_path / "codes")
    path = tmp_path / "codes" / "features.u16"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ShapeError, match="features reach from 65535 to 65535, outside a dictionary of 40"):
        written.rows(0, 9)


def test_no_batches_are_no_rows(tmp_path):
    assert write_codes(random_sae(TopK(3)), [], tmp_path / "codes").rows(0, 9).n_tokens == 0


def test_what_is_there_is_not_written_over(tmp_path):
    write_codes(random_sae(TopK(3)), [vectors()], tmp_path / "codes")
    with pytest.raises(FileError, match="there already; choose another folder"):
        write_codes(random_sae(TopK(3)), [vectors()], tmp_path / "codes")


def test_where_a_batch_fails_nothing_is_left(tmp_path):
    def batches():
        yield vectors()
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_codes(random_sae(TopK(3)), batches(), tmp_path / "codes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["values.f32", "features.u16", "row_starts.u64"])
def test_an_array_cut_short_is_damage(name, tmp_path):
    write_codes(random_sae(TopK(3)), [vectors()], tmp_path / "codes")
    path = tmp_path / "codes" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=rf"{name} is missing or not .* write the codes again"):
        CodesFile.open(tmp_path / "codes")


def test_a_folder_without_codes_or_of_a_later_format_is_refused(tmp_path):
    with pytest.raises(FileError, match="write them with write_codes"):
        CodesFile.open(tmp_path)
    facts = {"version": 9, "n_features": 1, "n_tokens": 0, "nnz": 0}
    (tmp_path / "codes.json").write_text(json.dumps(facts))
    with pytest.raises(FileError, match="of format 9, this saekit reads 1; update it"):
        CodesFile.open(tmp_path)
