"""Crosscoders: the equations per Site, what training finds at each, the folder, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.harvest import TensorSource
from saekit.activations.stream import START, Place, PlacedStream
from saekit.crosscoder import Crosscoder, join
from saekit.errors import DataError, FileError, SaekitError, ShapeError
from saekit.losses import fvu
from saekit.sae import SAE
from saekit.selection import MutualChoice, TopK
from saekit.targets import Site
from saekit.training import crosscoder as training
from saekit.training import loop
from saekit.training.config import TrainConfig
from saekit.training.crosscoder import train_crosscoder
from saekit.training.saved_run import RunFile

EARLY, LATE = Site.parse("layers.1"), Site.parse("layers.4")
WIDTHS = {EARLY: 8, LATE: 12}
DIRECTIONS = {
    site: torch.nn.functional.normalize(torch.randn(10, width, generator=torch.Generator().manual_seed(width)), dim=1)
    for site, width in WIDTHS.items()
}


def random_crosscoder() -> Crosscoder:
    sae = SAE(20, 16, TopK(3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return Crosscoder(sae, WIDTHS)


def vectors(n: int = 7) -> dict[Site, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(n, width, generator=generator, dtype=torch.float64) for site, width in WIDTHS.items()}


class Shared:
    """Both Sites carry the same sparse causes, the late one a hundred times as large; one cause is missing early."""

    widths = WIDTHS

    def draw(self, n: int, seed: int) -> dict[Site, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        causes = (torch.rand(n, 10, generator=generator).argsort(1) < 2) * (
            torch.rand(n, 10, generator=generator) + 0.5
        )
        here = {EARLY: causes * (torch.arange(10) > 0), LATE: causes}
        return {EARLY: here[EARLY] @ DIRECTIONS[EARLY] + 1, LATE: here[LATE] @ DIRECTIONS[LATE] * 100 - 30}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[dict[Site, ActivationBatch]]:
        while True:
            seed += 1
            drawn = self.draw(batch_tokens, seed)
            yield {site: ActivationBatch.from_vectors(x) for site, x in drawn.items()}


@pytest.fixture
def small_samples(monkeypatch) -> None:
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 2048)
    monkeypatch.setattr(training, "SAMPLE_TOKENS", 2048)


@pytest.fixture(scope="module")
def trained() -> Crosscoder:
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "SAMPLE_TOKENS", 2048)
    patch.setattr(training, "SAMPLE_TOKENS", 2048)
    config = TrainConfig(
        site=EARLY, rule=TopK(2), n_features=24, tokens=250 * 256, batch_tokens=256, learning_rate=1e-2
    )
    found = train_crosscoder(config, Shared(), [EARLY, LATE])
    patch.undo()
    return found


def test_codes_are_shared_and_each_site_has_its_own_decoder():
    cross, x = random_crosscoder(), vectors()
    sae = cross.sae
    blocks = {EARLY: slice(0, 8), LATE: slice(8, 20)}
    pre_acts = sum((x[s] - sae.b_dec[b]) @ sae.encoder[:, b].T for s, b in blocks.items()) + sae.b_enc
    codes = cross.encode(x)
    torch.testing.assert_close(codes.to_dense(), TopK(3)(pre_acts).to_dense())
    for site, block in blocks.items():
        torch.testing.assert_close(
            cross.decode(codes)[site], codes.to_dense() @ sae.decoder[:, block] + sae.b_dec[block]
        )
        assert torch.equal(cross.decoder()[site], sae.W_dec[:, block])
    assert cross.decoder_norms().shape == (16, 2)
    torch.testing.assert_close(cross.decoder_norms().square().sum(1), sae.W_dec.square().sum(1))
    with torch.no_grad():
        sae.decoder[3] = 0  # lives nowhere
    by_hand = cross.decoder_norms()[:3].square() / cross.decoder_norms()[:3].square().sum(1, keepdim=True)
    torch.testing.assert_close(cross.shares()[:3], by_hand)
    assert cross.shares()[3].tolist() == [0, 0]


def test_all_sites_are_reconstructed_however_loud_one_of_them_is(trained):
    x = Shared().draw(2048, seed=999_999)
    with torch.no_grad():
        reconstructed = trained.decode(trained.encode(x))
    for site in WIDTHS:
        assert float(fvu(x[site], reconstructed[site])) < 0.15, site
    assert trained.sites == (EARLY, LATE)


def test_a_feature_that_is_missing_at_a_site_writes_nothing_there(trained):
    written = {site: torch.nn.functional.normalize(rows, dim=1) for site, rows in trained.decoder().items()}
    similarity = written[LATE] @ DIRECTIONS[LATE].T
    best = similarity.argmax(0)  # the feature of each cause
    norms = trained.decoder_norms()
    torch.testing.assert_close(norms.square().sum(1), torch.ones(24), atol=1e-4, rtol=0)
    share = norms[best, 0] / norms[best].sum(1)
    assert share[0] < 0.15 and share[1:].min() > 0.25


def test_training_goes_on_from_a_crosscoder(trained, small_samples):
    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=256, batch_tokens=256, learning_rate=1e-6)
    going_on = train_crosscoder(config, Shared(), [EARLY, LATE], start=trained)
    x = Shared().draw(2048, seed=999_999)
    with torch.no_grad():
        before, after = trained.decode(trained.encode(x)), going_on.decode(going_on.encode(x))
    for site in WIDTHS:
        assert float(fvu(x[site], after[site])) == pytest.approx(float(fvu(x[site], before[site])), abs=0.02)
    swapped = Crosscoder(SAE(20, 24, TopK(2)), {LATE: 12, EARLY: 8})
    with pytest.raises(SaekitError, match=r"give the whole Crosscoder of layers\.1:out, layers\.4:out, in that order"):
        train_crosscoder(config, Shared(), [EARLY, LATE], start=swapped)


class Cached:
    """The same, as two caches that can be read again from any place."""

    widths = WIDTHS

    def __init__(self) -> None:
        drawn = Shared().draw(2048, seed=0)
        self.joined = TensorSource(site=EARLY, vectors=join(drawn, WIDTHS), buffer_tokens=512)

    def facts(self) -> dict[str, str | int | float | bool | None]:
        return self.joined.facts()

    def stream(self, batch_tokens: int, *, seed: int, start: Place = START) -> PlacedStream:
        return Apart(self.joined.stream(batch_tokens, seed=seed, start=start))


class Apart:
    def __init__(self, stream: PlacedStream):
        self.stream = stream

    @property
    def place(self) -> Place:
        return self.stream.place

    def __iter__(self):
        return self

    def __next__(self) -> dict[Site, ActivationBatch]:
        parts = next(self.stream)[EARLY].vectors.split(list(WIDTHS.values()), dim=1)
        return {site: ActivationBatch.from_vectors(part) for site, part in zip(WIDTHS, parts, strict=True)}


def test_a_source_says_how_wide_its_sites_are_without_being_asked_at_every_batch(small_samples):
    class Asked(Shared):
        times = 0

        @property
        def widths(self):
            Asked.times += 1  # a model may have to run for it
            return WIDTHS

    counts = []
    for steps in (4, 40):
        Asked.times = 0
        config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=steps * 256, batch_tokens=256)
        train_crosscoder(config, Asked(), [EARLY, LATE])
        counts.append(Asked.times)
    assert counts[0] == counts[1]


def test_what_set_the_scales_is_trained_on_and_made_once(small_samples):
    class Counted(Shared):
        made = 0

        def stream(self, batch_tokens: int, *, seed: int) -> Iterator[dict[Site, ActivationBatch]]:
            for batches in super().stream(batch_tokens, seed=seed):
                Counted.made += 1
                yield batches

    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=20 * 256, batch_tokens=256)
    found = train_crosscoder(config, Counted(), [EARLY, LATE])
    assert Counted.made == 20
    (again,) = loop.train([config], training.Joined(Shared(), EARLY, found.scales))
    per_dimension = torch.cat([torch.full((width,), found.scales[site]) for site, width in WIDTHS.items()])
    torch.testing.assert_close(found.sae.encoder, again.rescaled(1.0).encoder * per_dimension)


def stopping_at(last: int) -> Callable[[int, object], None]:
    def stop(step: int, reports: object) -> None:
        if step == last:
            raise InterruptedError

    return stop


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, small_samples):
    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=8 * 256, batch_tokens=256)
    whole = train_crosscoder(config, Cached(), [EARLY, LATE])
    path = tmp_path / "run.safetensors"

    with pytest.raises(InterruptedError):
        train_crosscoder(config, Cached(), [EARLY, LATE], on_step=stopping_at(5), run_file=RunFile(path=path, every=2))
    resumed = train_crosscoder(config, Cached(), [EARLY, LATE], run_file=RunFile(path=path, resume=True))
    assert torch.equal(resumed.sae.encoder, whole.sae.encoder) and torch.equal(resumed.sae.decoder, whole.sae.decoder)
    with pytest.raises(SaekitError, match="Shared cannot say what and where it reads, so its run cannot be resumed"):
        train_crosscoder(config, Shared(), [EARLY, LATE], run_file=RunFile(path=tmp_path / "other"))


def test_a_run_goes_on_only_with_its_sites_in_their_order(tmp_path, small_samples):
    """The weights of one would else be used on the other: the scales alone do not tell."""
    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=4 * 256, batch_tokens=256)
    path = tmp_path / "run.safetensors"

    with pytest.raises(InterruptedError):
        train_crosscoder(config, Cached(), [EARLY, LATE], on_step=stopping_at(3), run_file=RunFile(path=path, every=1))
    with pytest.raises(SaekitError, match="Sites"):
        train_crosscoder(config, Cached(), [LATE, EARLY], run_file=RunFile(path=path, resume=True))


def test_sites_whose_batches_are_of_other_tokens_are_not_joined():
    class Shifted(Shared):
        def stream(self, batch_tokens: int, *, seed: int) -> Iterator[dict[Site, ActivationBatch]]:
            for batches in super().stream(batch_tokens, seed=seed):
                late = batches[LATE]
                yield batches | {LATE: replace(late, position=late.position + 1)}

    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=4 * 256, batch_tokens=256)
    with pytest.raises(ShapeError, match="256 tokens at one Site and 256, or others, at another"):
        train_crosscoder(config, Shifted(), [EARLY, LATE])


def test_a_run_goes_on_where_activations_differ_in_the_last_bits(tmp_path, small_samples):
    """As on another device: scales that were measured once are not measured again."""
    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=4 * 256, batch_tokens=256)
    path = tmp_path / "run.safetensors"

    class Elsewhere(Cached):
        def __init__(self) -> None:
            super().__init__()
            self.known = self.joined.facts()
            self.joined = replace(self.joined, vectors=self.joined.vectors * (1 + 1e-5))

        def facts(self) -> dict[str, str | int | float | bool | None]:
            return self.known

    started = train_crosscoder(config, Cached(), [EARLY, LATE])
    saved = RunFile(path=path, every=1)
    with pytest.raises(InterruptedError):
        train_crosscoder(config, Cached(), [EARLY, LATE], start=started, on_step=stopping_at(3), run_file=saved)
    saved = RunFile(path=path, resume=True)
    resumed = train_crosscoder(config, Elsewhere(), [EARLY, LATE], start=started, run_file=saved)
    whole = train_crosscoder(config, Cached(), [EARLY, LATE], start=started)
    assert resumed.scales == whole.scales
    torch.testing.assert_close(resumed.sae.encoder, whole.sae.encoder, rtol=1e-2, atol=1e-3)
    elsewhere = Site.parse("layers.7")
    with pytest.raises(FileError, match=r"was saved by a run without layers\.7:out; resume with the Sites"):
        training._saved_scales(path, [EARLY, elsewhere])


def test_a_stream_that_was_looked_into_is_let_go_by_a_run_that_goes_on_elsewhere():
    begun = {(256, 0): loop.Ahead(Cached().stream(256, seed=0))}
    begun[256, 0].look(1)
    place = next_place(Cached().stream(256, seed=0))
    stream = training.Joined(Cached(), EARLY, dict.fromkeys(WIDTHS, 1.0), begun=begun).stream(256, seed=0, start=place)
    assert not begun and stream.place == place


def next_place(stream: PlacedStream) -> Place:
    next(stream)
    assert stream.place is not None
    return stream.place


def test_a_site_that_says_nothing_is_refused(small_samples):
    class Still(Shared):
        def draw(self, n: int, seed: int) -> dict[Site, Tensor]:
            return super().draw(n, seed) | {EARLY: torch.full((n, WIDTHS[EARLY]), 0.1)}

    config = TrainConfig(site=EARLY, rule=TopK(2), n_features=24, tokens=512, batch_tokens=256)
    with pytest.raises(DataError, match=r"all 2,048 activations at layers\.1:out are equal; .* check the Site"):
        train_crosscoder(config, Still(), [EARLY, LATE])


def test_it_comes_back_from_its_folder(tmp_path):
    cross = random_crosscoder()
    cross.sae.float()
    metadata = dict(cross.sae.cfg.metadata)
    cross.save(tmp_path / "cross")
    back = Crosscoder.load(tmp_path / "cross")
    torch.testing.assert_close(back.decoder_norms(), cross.decoder_norms())
    assert back.widths == WIDTHS and list(back.widths) == list(WIDTHS)
    assert torch.equal(back.sae.encoder, cross.sae.encoder)
    assert cross.sae.cfg.metadata == metadata


def test_an_sae_of_one_site_is_no_crosscoder(tmp_path):
    SAE(4, 8, TopK(2)).save(tmp_path / "sae")
    with pytest.raises(FileError, match=r"holds an SAE of one Site, not a crosscoder; load it with SAE\.load"):
        Crosscoder.load(tmp_path / "sae")


def test_sites_that_do_not_fit_are_refused():
    cross, x = random_crosscoder(), vectors()
    with pytest.raises(ShapeError, match=r"layers\.4:out is missing; read it too"):
        cross.encode({EARLY: x[EARLY]})
    with pytest.raises(ShapeError, match=r"one vector for each token.*\(6, 12\).*in one pass"):
        cross.encode({EARLY: x[EARLY], LATE: x[LATE][1:]})
    with pytest.raises(ShapeError, match=r"Sites of 8, 3 numbers make 11, but the SAE encodes 20"):
        Crosscoder(cross.sae, {EARLY: 8, LATE: 3})


@pytest.mark.parametrize(
    ("sites", "changes", "message"),
    [
        ([EARLY], {}, r"two or more different Sites .*got layers\.1:out; the source supplies layers\.1:out, layers\.4"),
        ([EARLY, EARLY], {}, "two or more different Sites"),
        ([EARLY, Site.parse("layers.9")], {}, r"got layers\.1:out, layers\.9:out"),
        ([EARLY, LATE], {"equal_norms": True}, "leave site_out and equal_norms away"),
    ],
)
def test_what_cannot_be_trained_is_refused(sites, changes, message):
    config = TrainConfig(site=EARLY, rule=MutualChoice(2), n_features=24, tokens=512, batch_tokens=256, **changes)
    with pytest.raises(SaekitError, match=message):
        train_crosscoder(config, Shared(), sites)
