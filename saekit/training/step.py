"""One training step. `measure` looks and changes nothing; `train_step` is the only thing that changes a state."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.codes import SparseCodes
from saekit.density import RunningDensity
from saekit.errors import DataError
from saekit.losses import aux_k_loss, aux_zipf_loss, fvu, summed_mse
from saekit.sae import SAE, SAEConfig
from saekit.selection import FeatureChoice
from saekit.training.config import TrainConfig

Vectors = Float[Tensor, "n_tokens d_model"]


@dataclass(slots=True)
class TrainState:
    """The one mutable object of training.

    Attributes:
        sae: the weights, for inputs that have been multiplied by `input_scale`.
        optimizer: Adam and its moments.
        density: how often each feature has fired lately.
        input_scale: brings activations to unit variance per dimension.
        step: steps taken.
    """

    config: TrainConfig
    sae: SAE
    optimizer: torch.optim.Optimizer
    density: RunningDensity
    input_scale: float
    step: int = 0

    @classmethod
    def start(cls, config: TrainConfig, sample: Vectors, *, cfg: SAEConfig | None = None) -> "TrainState":
        """Seeded weights, with pre-bias and input scale read off a sample of activations."""
        d_model = sample.shape[1]
        # not by their spread: the mean of equal numbers differs from them by rounding
        if bool((sample == sample[0]).all()):
            raise DataError(
                f"all {len(sample):,} activations at {config.site} are equal; there is nothing to learn; check the Site"
            )
        centre = _centre(config, sample)
        spread = (sample - centre).square().sum(1).mean().sqrt()
        input_scale = float(d_model**0.5 / spread)
        cfg = cfg or SAEConfig(d_in=d_model, d_sae=config.n_features, hook_name=str(config.site))
        state = cls.blank(config, cfg, input_scale=input_scale, device=sample.device)
        with torch.no_grad():
            state.sae.b_dec.copy_(centre * input_scale)
        return state

    @classmethod
    def blank(
        cls, config: TrainConfig, cfg: SAEConfig, *, input_scale: float, device: torch.device | str = "cpu"
    ) -> "TrainState":
        """Seeded weights and no history: what `start`, or the file of an unfinished run, fills in."""
        sae = SAE(cfg.d_in, config.n_features, config.rule, cfg=replace(cfg, equal_norms=config.equal_norms))
        sae.initialise(torch.Generator().manual_seed(config.seed))
        sae.to(device)
        return cls(
            config=config,
            sae=sae,
            optimizer=torch.optim.Adam(
                sae.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True
            ),
            density=RunningDensity.new(
                config.n_features, horizon=max(config.tokens / 10, 20.0 * config.batch_tokens), device=device
            ),
            input_scale=input_scale,
        )

    def finished(self) -> SAE:
        """A copy of the SAE in the units of the model's own activations."""
        return self.sae.rescaled(1 / self.input_scale)


@dataclass(frozen=True, slots=True)
class Report:
    """What a batch shows of an SAE; the tensors carry gradients.

    Attributes:
        codes: of the batch.
        loss: what training minimises.
        fvu: fraction of variance unexplained on this batch.
        auxiliary: the auxiliary loss before weighting.
    """

    codes: SparseCodes
    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]


def measure(state: TrainState, vectors: Vectors) -> Report:
    """Pure: safe to call for logging, evaluation or training, any number of times."""
    x = vectors * state.input_scale
    codes = state.sae.encode(x)
    x_hat = state.sae.decode(codes)
    auxiliary = _auxiliary(state, x, codes)
    main = summed_mse(x, x_hat)
    # the auxiliary loss is 1 for a useless explanation, the main one d_model for a useless reconstruction
    loss = main + state.config.aux_weight * state.sae.d_model * auxiliary
    with torch.no_grad():
        unexplained = fvu(x, x_hat)
    return Report(codes, loss, unexplained, auxiliary)


def train_step(state: TrainState, vectors: Vectors) -> Report:
    """Take one optimiser step on a batch of activations in the model's own units."""
    config, sae = state.config, state.sae
    if isinstance(config.rule, FeatureChoice) and state.step % config.ranks_every == 0:
        sae.rule = replace(config.rule, ranks=state.density.ranks())
    report = measure(state, vectors)
    report.loss.backward()
    sae.project_decoder_gradient()
    nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
    for group in state.optimizer.param_groups:
        group["lr"] = config.peak_lr * config.lr_factor(state.step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    sae.normalise_decoder()
    state.density.observe(report.codes)
    state.step += 1
    return report


def _auxiliary(state: TrainState, x: Vectors, codes: SparseCodes) -> Float[Tensor, ""]:
    config = state.config
    k_aux = config.k_aux or max(1, state.sae.d_model // 2)
    # until a feature has had the time to fire, nobody is dead or under-used
    if config.auxiliary == "none" or state.step * config.batch_tokens <= config.dead_threshold:
        return x.new_zeros(())
    if config.auxiliary == "k":
        return aux_k_loss(state.sae, x, codes, density=state.density, k_aux=k_aux, dead_after=config.dead_threshold)
    return aux_zipf_loss(
        state.sae,
        x,
        codes,
        density=state.density,
        k_aux=k_aux,
        dead_after=config.dead_threshold,
        below=config.under_used_below,
    )


def _centre(config: TrainConfig, sample: Vectors) -> Float[Tensor, " d_model"]:
    match config.pre_bias:
        case "zero":
            return sample.new_zeros(sample.shape[1])
        case "mean":
            return sample.mean(0)
        case "median":
            return geometric_median(sample)


def geometric_median(points: Vectors, *, iterations: int = 30) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to all others (Weiszfeld's algorithm); outliers barely move it."""
    estimate = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - estimate).norm(dim=1).clamp(min=1e-8)
        estimate = (weights[:, None] * points).sum(0) / weights.sum()
    return estimate
