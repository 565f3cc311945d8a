"""One training step. `measure` looks and changes nothing; `train_step` is the only thing that changes a state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.codes import SparseCodes
from saekit.density import RunningDensity, dead
from saekit.errors import DataError
from saekit.kernels.screen import bf16_screening
from saekit.losses import AuxK, AuxZipf, aux_zipf_loss, fvu, only_the_dead, revived_features
from saekit.normalisation import EqualNorms, Plain
from saekit.revival import Members
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK
from saekit.targets import Site
from saekit.training.calibrate import calibrate
from saekit.training.config import TrainConfig
from saekit.training.descent import descend
from saekit.training.first_scale import fit_first_scale
from saekit.training.resample import resample
from saekit.training.warm_start import check_start, in_training_units

Vectors = Float[Tensor, "n_tokens d_model"]
Targets = Float[Tensor, "n_tokens d_out"]
Pool = Float[Tensor, "n_pool d_model"]

# steps between looks at which features would win if all matches competed; each costs one encoder product
DEMAND_EVERY = 10


@dataclass(slots=True)
class TrainState:
    """The one mutable object of training.

    Attributes:
        sae: the weights, for inputs `vectors * input_scale - input_centre` and outputs `targets * output_scale`.
        extra: what the objective trains beside the SAE's weights.
        optimizer: Adam and its moments, over both.
        density: how often each feature has fired lately.
        demand: how often each would if all matches competed; ranks Feature Choice's budgets.
        rule: which matches are kept in this phase of the run.
        in_force: the same at this step, with its ranks and its annealed k; `sae.rule` is this, or its cuts.
        input_scale, output_scale: bring activations to unit variance per dimension.
        input_centre: of a transcoder, whose `b_dec` is the output's; zero for an autoencoder.
        ranks: places of the features on Feature Choice's curve, until the next look at `demand`.
        pooled: steps for which the cuts of the last pool still hold.
        step: steps taken.
    """

    config: TrainConfig
    sae: SAE
    extra: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    density: RunningDensity
    demand: RunningDensity
    rule: SelectionRule
    in_force: SelectionRule
    input_scale: float
    output_scale: float
    input_centre: Float[Tensor, " d_model"]
    ranks: Int[Tensor, " n_features"] | None = None
    pooled: int = 0
    step: int = 0

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        sample: Vectors,
        targets: Targets | None = None,
        *,
        cfg: SAEConfig | None = None,
        start: SAE | None = None,
    ) -> "TrainState":
        """Seeded weights, or those of `start`; biases and scales are read off a sample of activations (and targets)."""
        input_scale, centre_in = _scale_and_centre(config, sample)
        output_scale, centre_out = (input_scale, centre_in) if targets is None else _scale_and_centre(config, targets)
        cfg = cfg or cfg_of(config, sample.shape[1], None if targets is None else targets.shape[1])
        state = cls.blank(config, cfg, input_scale=input_scale, output_scale=output_scale, device=sample.device)
        if start is not None:
            check_start(start, cfg, skip=config.skip, rule=config.rule)
            known = in_training_units(start, input_scale=input_scale, output_scale=output_scale)
            state.sae.load_state_dict(known.state_dict())
            # its own cuts are where an objective that learns them begins
            state.set_extra(config.objective.extra(state.sae.with_rule(known.rule), state.inputs(sample)))
            return state
        with torch.no_grad():
            state.sae.b_dec.copy_(centre_out)
        if targets is not None:
            state.input_centre = centre_in
        elif config.encoder_start == "fit" and config.objective.fits_start:
            first = state.inputs(sample)[: config.batch_tokens]
            fit_first_scale(state.sae.with_rule(_annealed(config, config.rule, step=0)), config.objective, first, first)
        state.set_extra(config.objective.extra(state.sae, state.inputs(sample)))
        return state

    @classmethod
    def blank(
        cls,
        config: TrainConfig,
        cfg: SAEConfig,
        *,
        input_scale: float,
        output_scale: float,
        device: torch.device | str = "cpu",
    ) -> "TrainState":
        """Seeded weights and no history: what `start`, or the file of an unfinished run, fills in."""
        sae = SAE(cfg.d_in, config.n_features, config.rule, skip=config.skip, cfg=cfg)
        sae.initialise(torch.Generator().manual_seed(config.seed))
        horizon = float(config.density_horizon or max(config.tokens / 10, 20.0 * config.batch_tokens))
        return cls(
            config=config,
            sae=sae.to(device),
            extra={},
            optimizer=_adam(config, list(sae.parameters())),
            density=RunningDensity.new(config.n_features, horizon=horizon, device=device),
            demand=RunningDensity.new(config.n_features, horizon=horizon / DEMAND_EVERY, device=device),
            rule=config.rule,
            in_force=config.rule,
            input_scale=input_scale,
            output_scale=output_scale,
            input_centre=torch.zeros(cfg.d_in, device=device),
        )

    def set_extra(self, values: Mapping[str, Tensor]) -> None:
        """Give the objective its tensors, and the optimiser what it now has to move."""
        self.extra = {name: nn.Parameter(value) for name, value in values.items()}
        self.optimizer = _adam(self.config, self.trained())

    def trained(self) -> list[nn.Parameter]:
        """Everything that the optimiser moves, in an order that outlives a file."""
        return [*self.sae.parameters(), *(self.extra[name] for name in sorted(self.extra))]

    def inputs(self, vectors: Vectors) -> Vectors:
        """Activations in the units of training."""
        return vectors * self.input_scale - self.input_centre

    def finished(self) -> SAE:
        """A copy of the SAE in the units of the model's own activations."""
        rule = self.rule
        if isinstance(rule, FeatureChoice) and rule.ranks is None:
            rule = replace(rule, ranks=self.ranks)
        sae = self.config.objective.finished(self.sae.with_rule(rule), self.extra)
        finished = sae.rescaled(1 / self.input_scale, out_scale=1 / self.output_scale)
        centre = self.input_centre / self.input_scale
        with torch.no_grad():
            finished.b_enc.sub_(finished.encoder @ centre)
            if finished.skip is not None:
                finished.b_dec.sub_(finished.skip @ centre)
        return finished


@dataclass(frozen=True, slots=True)
class Report:
    """What a batch shows of an SAE; the tensors carry gradients.

    Attributes:
        codes: of the batch.
        rule: what the SAE is trained under at this step, before pooling turns it into cuts.
        loss: what training minimises.
        fvu: fraction of variance unexplained on this batch.
        auxiliary: the auxiliary loss before weighting.
        revived: rows of the weights that the auxiliary loss works on, whose gradients are handed over apart;
            None before it does.
    """

    codes: SparseCodes
    rule: SelectionRule
    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    revived: Members | None


def measure(state: TrainState, vectors: Vectors, targets: Targets | None = None) -> Report:
    """Pure: safe to call for logging, evaluation or training, any number of times.

    Args:
        targets: what a transcoder is to give for each vector; None for an autoencoder.
    """
    x = state.inputs(vectors)
    y = x if targets is None else targets * state.output_scale
    codes, y_hat, main = state.config.objective.measure(state.sae, state.extra, x, y)
    options, members, auxiliary = _aux_options(state.config), None, x.new_zeros(())
    if options and state.step * state.config.batch_tokens > _warmup_tokens(state.config, options):
        members = Members.of(state.sae, revived_features(state.density, options), apart=True)
        auxiliary = aux_zipf_loss(
            state.sae, x, codes, density=state.density, options=options, residual=(y - y_hat).detach(), members=members
        )
    weight = options.weight if options else 0.0
    # the auxiliary loss is 1 for a useless explanation, the main one d_out for a useless reconstruction
    loss = main + weight * state.sae.d_out * auxiliary
    with torch.no_grad():
        unexplained = fvu(y, y_hat)
    return Report(codes, state.in_force, loss, unexplained, auxiliary, members)


def train_step(
    state: TrainState, vectors: Vectors, targets: Targets | None = None, *, pool: Pool | None = None
) -> Report:
    """Take one optimiser step on a batch of activations in the model's own units.

    Args:
        targets: what a transcoder is to give for each vector; None for an autoencoder.
        pool: the vectors of this and the next steps, which Feature Choice shares its budgets over from now
            on; without one, or when its steps are over, each batch shares its own.
    """
    with bf16_screening(state.config.bf16_screening):
        return _train_step(state, vectors, targets, pool)


def _train_step(state: TrainState, vectors: Vectors, targets: Targets | None, pool: Pool | None) -> Report:
    config, sae = state.config, state.sae
    _choose_rule(state, vectors, pool)
    if config.resample and config.resample.is_due(state.step, config.steps):
        _cut_anew(state, _resample(state, vectors, targets), pool)
    report = measure(state, vectors, targets)
    report.loss.backward()
    if report.revived:
        report.revived.hand_over(sae)
    descend(
        state.optimizer,
        lr=config.peak_lr * config.lr_factor(state.step),
        clip=config.clip,
        unit_rows=sae.decoder,
    )
    state.density.observe(report.codes)
    state.step += 1
    return report


def _annealed(config: TrainConfig, rule: SelectionRule, *, step: int) -> SelectionRule:
    if config.anneal and isinstance(rule, TopK | MutualChoice | FeatureChoice):
        return replace(rule, k=config.anneal.k(rule.k, step / config.steps))
    return rule


@torch.no_grad()
def _choose_rule(state: TrainState, vectors: Vectors, pool: Pool | None) -> None:
    """Set what the rule of this phase of the run means at this step."""
    config, sae = state.config, state.sae
    if config.then and state.step == config.then.first_step(config.steps):
        first = config.rule
        assert isinstance(first, TopK | MutualChoice)  # which the config has seen to
        state.rule = config.then.rule(first.k, state.density, relu=first.relu)
    rule = _annealed(config, state.rule, step=state.step)
    if isinstance(rule, FeatureChoice) and rule.ranks is None and rule.exponent > 0:
        if state.step % DEMAND_EVERY == 0:
            prepared, _ = sae.prepare(state.inputs(vectors))
            state.demand.observe(MutualChoice(rule.k).encode(prepared, sae.encoder, sae.b_enc))
        if state.ranks is None or state.step % config.ranks_every == 0:
            state.ranks = state.demand.ranks()
        rule = replace(rule, ranks=state.ranks)
    state.in_force = rule
    if isinstance(rule, FeatureChoice) and pool is not None:
        state.pooled = len(pool) // len(vectors)
        sae.rule = calibrate(sae.with_rule(rule), state.inputs(pool))
    elif state.pooled <= 0:
        sae.rule = rule
    state.pooled -= 1


def _resample(state: TrainState, vectors: Vectors, targets: Targets | None) -> Int[Tensor, " resampled"]:
    x = state.inputs(vectors)
    resampled = resample(
        state.sae,
        state.optimizer,
        x,
        x if targets is None else targets * state.output_scale,
        dead(state.density.tokens_since_fired, after=state.config.dead_threshold),
        encoder_norm=state.config.resample.encoder_norm if state.config.resample else 1.0,
        seed=state.config.seed * 1_000_003 + state.step,
    )
    state.density.tokens_since_fired[resampled] = 0
    return resampled


def _cut_anew(state: TrainState, resampled: Int[Tensor, " resampled"], pool: Pool | None) -> None:
    """The pool's cuts are of the old weights: measure them again where it begins, else wait for the next pool."""
    sae = state.sae
    if not len(resampled):
        return
    if isinstance(state.in_force, FeatureChoice) and pool is not None:
        sae.rule = calibrate(sae.with_rule(state.in_force), state.inputs(pool))
    elif state.pooled >= 0 and isinstance(sae.rule, Threshold):
        theta = sae.rule.per_feature(sae.n_features, sae.encoder)
        sae.rule = replace(sae.rule, theta=theta.index_fill(0, resampled, torch.inf))


def _warmup_tokens(config: TrainConfig, options: AuxZipf) -> int:
    return config.dead_threshold if options.warmup is None else options.warmup


def _aux_options(config: TrainConfig) -> AuxZipf | None:
    auxiliary = config.auxiliary
    options = only_the_dead(auxiliary) if isinstance(auxiliary, AuxK) else auxiliary
    return options and replace(options, dead_after=config.dead_threshold)


def _adam(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=config.peak_lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


def cfg_of(config: TrainConfig, d_in: int, d_out: int | None = None) -> SAEConfig:
    """What an SAE trained by this config reads and writes; `d_out` is that of a transcoder."""
    return SAEConfig(
        d_in=d_in,
        d_sae=config.n_features,
        d_out=d_out,
        hook_name=str(config.site),
        hook_name_out=str(config.site_out or ""),
        apply_b_dec_to_input=d_out is None,
        normalisation=EqualNorms() if config.equal_norms else Plain(),
    )


def _scale_and_centre(config: TrainConfig, sample: Vectors) -> tuple[float, Float[Tensor, " d_model"]]:
    """What brings activations to unit variance per dimension, and where `pre_bias` begins afterwards."""
    check_varied(sample, config.site)
    # about the mean, whatever pre_bias is: what is far from zero need not spread far
    spread = (sample - sample.mean(0)).square().sum(1).mean().sqrt()
    scale = float(sample.shape[1] ** 0.5 / spread)
    return scale, _centre(config, sample) * scale


def check_varied(sample: Vectors, site: Site) -> None:
    """Refuse activations that are all the same."""
    # not by their spread: the mean of equal numbers differs from them by rounding
    if bool((sample == sample[0]).all()):
        raise DataError(
            f"all {len(sample):,} activations at {site} are equal; there is nothing to learn; check the Site"
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
