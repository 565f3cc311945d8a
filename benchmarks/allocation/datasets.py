"""Where the activations come from: two language models and three synthetic truths."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

import saekit
from saekit.activations.batch import ActivationSource
from saekit.activations.corpus import load_corpus
from saekit.activations.harvest import Harvest, take
from saekit.activations.mask import MaskPolicy
from saekit.activations.synthetic import SyntheticConfig, SyntheticSource, synthetic_truth
from saekit.activations.text import Document
from saekit.activations.tokens import TokenRows
from saekit.errors import SaekitError
from saekit.targets import Site, Target

CONTEXT = 256
HELD_OUT_ROWS = 160
HELD_OUT_SEED = 1_000_003
# vectors held for shuffling; neighbours in a text are alike, so more than a few batches
BUFFER_TOKENS = 1 << 16

# 1,024 features in 64 dimensions; some co-occur, some are children of others
TRUTH = SyntheticConfig(d_model=64, n_features=1024, l0=8.0, cluster_size=4, correlation=0.3, children=0.2)
OUTLIERS = replace(TRUTH, outlier_dims=2, outlier_size=30.0)
# with where `b_dec` starts: at the middle of the data, which is the remedy for outliers, or at zero
TRUTHS = {
    "synthetic": (TRUTH, "median"),
    "synthetic_outliers": (OUTLIERS, "median"),
    "synthetic_outliers_uncentred": (OUTLIERS, "zero"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Activations to train on and rows to evaluate on.

    Attributes:
        source: for training.
        target, rows, site, mask: for evaluation; of synthetic data the model is a table of activations.
        pre_bias: where `b_dec` of an SAE starts.
        is_language: whether the target predicts tokens.
        documents: what the rows were made from, where their tokens have exact labels.
        truth: of synthetic data.
        fingerprint: of the model's weights or the truth, so that results of others do not count as done. The text
            of pystd is the standard library of the Python that runs, which a row names.
    """

    source: ActivationSource
    train_site: Site
    d_model: int
    target: Target
    rows: TokenRows
    site: Site
    mask: MaskPolicy = MaskPolicy()
    pre_bias: str = "median"
    is_language: bool = True
    documents: tuple[Document, ...] = ()
    truth: SyntheticSource | None = None
    fingerprint: str


def open_dataset(name: str, *, shared: Path) -> Dataset:
    """One of `grids.DATASETS`.

    Args:
        shared: the folder that holds stories260K and its text.

    Raises:
        SaekitError: if there is no such data set, or its files are not there.
    """
    if name == "pystd":
        weights = Path(saekit.__file__).parent / "assets" / "pystd" / "model.safetensors"
        return _language("pystd", "stdlib", site=None, weights=weights, concepts=True, row_bos=True)
    if name == "stories260K":
        model, text = shared / "stories260K" / "hf", shared / "text" / "tinystories_2mb.txt"
        if not model.is_dir() or not text.is_file():
            raise SaekitError(f"there is no stories260K in {shared}; pass --shared, or leave it out with --datasets")
        weights = model / "model.safetensors"
        # this model was trained on a stream that is cut anywhere
        return _language(str(model), str(text), site="layers.2", weights=weights, concepts=False, row_bos=False)
    if name not in TRUTHS:
        raise SaekitError(f"no data set named {name!r}; expected pystd, stories260K, {', '.join(TRUTHS)}")
    return _synthetic(*TRUTHS[name])


class Table(nn.Module):
    """Token ids are row numbers of a table of activations, so that evaluation needs no second path for them."""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(vectors)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


def _synthetic(config: SyntheticConfig, pre_bias: str) -> Dataset:
    source = SyntheticSource(truth=synthetic_truth(config))
    n_tokens = HELD_OUT_ROWS * CONTEXT
    held_out = take(source.stream(CONTEXT, seed=HELD_OUT_SEED), n_tokens, source.site)
    return Dataset(
        source=source,
        train_site=source.site,
        d_model=config.d_model,
        target=Target.wrap(Table(held_out.vectors), name="table"),
        rows=TokenRows.from_ids(torch.arange(n_tokens).view(HELD_OUT_ROWS, CONTEXT)),
        site=Site("rows"),
        pre_bias=pre_bias,
        is_language=False,
        truth=source,
        fingerprint=sha256(repr(config).encode()).hexdigest()[:12],
    )


def _language(model: str, text: str, *, site: str | None, weights: Path, concepts: bool, row_bos: bool) -> Dataset:
    target = Target.load(model)
    corpus = load_corpus(text, target.tokenizer, context=CONTEXT, held_out_rows=HELD_OUT_ROWS, row_bos=row_bos)
    where = Site.parse(site) if site else target.middle_site()
    return Dataset(
        source=Harvest(target=target, rows=corpus.train, sites=(where,), buffer_tokens=BUFFER_TOKENS),
        train_site=where,
        d_model=target.width(where),
        target=target,
        rows=corpus.held_out.select(slice(HELD_OUT_ROWS)),
        site=where,
        documents=corpus.held_out_documents if concepts else (),
        fingerprint=sha256(weights.read_bytes()).hexdigest()[:12],
    )
