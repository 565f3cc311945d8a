"""Patching every feature at every place of several Sites: the same as one by one, and resumable."""

import pytest
import torch
from small_models import FIRST, IDS, SECOND, TOKENS, sae_of, tiny_llama

from saekit.errors import FileError, SaekitError, ShapeError
from saekit.patching.effects import read_prompts
from saekit.patching.metric import LogitDifference
from saekit.patching.patch_table import patch_features
from saekit.selection import Threshold, TopK
from saekit.targets import Target

OTHER = torch.tensor([[0, 9, 8, 30, 6], [0, 5, 12, 3, 2]])
METRIC = LogitDifference(torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([4, 4]))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


@pytest.fixture(scope="module")
def saes():
    return {FIRST: sae_of(TopK(4)), SECOND: sae_of(Threshold(0.3), seed=1)}


def patch(target, saes, metric=METRIC, **more):
    return patch_features(target, saes, IDS, OTHER, metric, mask=TOKENS, batch_rows=7, **more)


@torch.no_grad()
def test_every_place_that_differs_is_patched_once_with_its_indirect_effect(target, saes):
    tables = patch(target, saes)
    assert list(tables) == [FIRST, SECOND]
    base = METRIC(target.run(IDS), torch.arange(2))
    for site, table in tables.items():
        own, other = (read_prompts(target, saes[site], site, ids, mask=TOKENS).codes.to_dense() for ids in (IDS, OTHER))
        change = (other - own).view(2, 5, -1).detach()
        places = list(zip(table.at.prompt.tolist(), table.at.position.tolist(), table.at.feature.tolist(), strict=True))
        assert places == [tuple(place) for place in change.nonzero().tolist()]
        assert min(position for _, position, _ in places) >= 2  # BOS and the tokens before the difference are equal
        for (prompt, position, feature), effect in list(zip(places, table.effect.tolist(), strict=True))[::5]:
            patched = torch.zeros(2, 5, 16)
            patched[prompt, position] = change[prompt, position, feature] * saes[site].decoder[feature]
            with target.editing({site: lambda x, p=patched: x + p}):
                want = METRIC(target.run(IDS), torch.arange(2)) - base
            assert effect == pytest.approx(float(want[prompt]), abs=1e-5)
        torch.testing.assert_close(table.total, (METRIC(target.run(OTHER), torch.arange(2)) - base).double())
        assert table.effect.abs().max() > 1e-3


@pytest.mark.parametrize("where, after", [(FIRST, 7), (SECOND, 14)])
def test_a_stopped_run_goes_on_to_the_same_numbers_bit_for_bit(target, saes, tmp_path, where, after):
    want, file = patch(target, saes), tmp_path / "patching.safetensors"

    def stop(site, done, of) -> None:
        if (site, done) == (where, after):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(target, saes, unfinished=file, on_progress=stop)
    with pytest.raises(FileError, match=r"holds an unfinished run; pass --resume|pass --resume"):
        patch(target, saes, unfinished=file)
    about_another = r"is about another model or metric, or other prompts, SAEs, Sites or batches; give the same"
    with pytest.raises(FileError, match=about_another):
        patch(target, {FIRST: saes[FIRST]}, unfinished=file, resume=True)
    another_rule = {site: sae.with_rule(TopK(3)) for site, sae in saes.items()}
    with pytest.raises(FileError, match=about_another):
        patch(target, another_rule, unfinished=file, resume=True)
    another_metric = LogitDifference(torch.tensor([3, 7]), torch.tensor([5, 6]), torch.tensor([4, 4]))
    with pytest.raises(FileError, match=about_another):
        patch(target, saes, metric=another_metric, unfinished=file, resume=True)
    seen = []
    got = patch(target, saes, unfinished=file, resume=True, on_progress=lambda *said: seen.append(said[:2]))
    assert all(torch.equal(want[site].effect, got[site].effect) for site in want)
    assert (FIRST, 7) not in seen and not file.exists()


def test_what_cannot_be_patched_is_refused(target, saes):
    with pytest.raises(ShapeError, match=r"give prompts of the same sizes"):
        patch_features(target, saes, IDS, OTHER[:, :4], METRIC, mask=TOKENS)
    with pytest.raises(SaekitError, match=r"resume needs to know from where"):
        patch(target, saes, resume=True)
