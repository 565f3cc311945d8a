"""A model to interpret: run it, read its tensors, replace them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from saekit.errors import SaekitError, ShapeError
from saekit.targets.calls import call_for
from saekit.targets.facts import config_number
from saekit.targets.load import first_line, load_language_model
from saekit.targets.names import Place, find_blocks, first_name
from saekit.targets.passes import Passes, watched
from saekit.targets.site import Site
from saekit.targets.taps import StopForward, Tap, evaluating, first_tensor, tapped

Edit = Callable[[Tensor], Tensor]
_NO_EDITS: Mapping[Site, Edit] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Target:
    """A model, its tokenizer, and how to call it on a batch.

    The model is never altered: hooks are there while it runs and gone afterwards, whatever happens, and
    it runs in eval mode (no dropout) but is left in the mode that it was in. Make one with `wrap` or `load`.

    Attributes:
        name: what the model is called in reports and file names.
        tokenizer: None for a model of something else than text.
        forward: how to call the model on a batch.
        example: a batch that the model can run on, where a 1 x 2 batch of token 0 is not one.
    """

    model: nn.Module = field(repr=False)
    name: str
    tokenizer: Any = field(repr=False)
    forward: Callable[[nn.Module, Tensor], Any] = field(repr=False)
    example: Tensor | None = field(default=None, repr=False)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        example: Tensor | None = None,
    ) -> "Target":
        """A model that is already in memory: of transformers, of TransformerLens (3 or 4), or any `nn.Module`.

        Without `forward` the model is called as its library would have it, and as `model(batch)` if it has none.
        """
        return cls(model, name or type(model).__name__, tokenizer, forward or call_for(model), example)

    @classmethod
    def load(cls, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "Target":
        """A causal language model with its tokenizer: "pystd" (bundled), a local folder, or a name on the Hub.

        Raises:
            FileError: no such folder or name, or files that are missing, truncated or do not fit together.
        """
        model, tokenizer = load_language_model(name, dtype=dtype)
        return cls.wrap(model.to(device), tokenizer, name=name)

    @property
    def context(self) -> int | None:
        """The longest row of tokens that the model was made for; None if it does not say."""
        return config_number(self.model, "n_ctx", "max_position_embeddings", "n_positions", "max_seq_len")

    @property
    def vocabulary(self) -> int | None:
        """How many token ids the model knows; None if it does not say."""
        return config_number(self.model, "d_vocab", "vocab_size")

    @property
    def device(self) -> torch.device:
        """Where the first of the model's weights is; batches are sent there."""
        return next(self.model.parameters(), torch.empty(0)).device

    def middle_site(self) -> Site:
        """The output of the middle block, the lower of two: where to look when nothing says otherwise.

        Raises:
            SaekitError: the model has no list of blocks.
        """
        blocks = find_blocks(self.model)
        if blocks is None:
            raise SaekitError(f"{self.name} has no list of blocks to find the middle of; name a Site")
        middle = (len(self.model.get_submodule(blocks)) - 1) // 2  # pyright: ignore[reportArgumentType]
        module, call = first_name(self.model, f"{blocks}.{middle}")
        return Site(module, call=call)

    def width(self, site: Site) -> int:
        """Size of the last dimension at a Site, found by running the model on `example`.

        Raises:
            SaekitError: the model has no `example` and cannot run on token ids.
        """
        if self.example is not None:
            return self.read(self.example, [site])[site].shape[-1]
        try:
            return self.read(torch.zeros(1, 2, dtype=torch.int64), [site])[site].shape[-1]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, SaekitError):
                raise
            raise SaekitError(
                f"{self.name} cannot run on token ids ({first_line(error)}), so the width of {site} "
                "is unknown; give it a batch to try: Target.wrap(model, example=...)"
            ) from error

    def read(self, batch: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The tensors at `sites` in one forward pass, which stops once all of them have been seen.

        They are copies without gradients, as they were when they passed (a model may overwrite them
        later). A Site that stands for every call (`@*`) gives one tensor with a leading dimension of
        calls, `(calls, batch, ...)`, and the pass runs to its end, since only then are all calls known.

        Raises:
            UnknownNameError: a Site that the model does not have.
            ShapeError: `@*` where the calls differ in shape.
            SaekitError: a call that never came, or a Site that carries no tensor.
        """
        seen: dict[Place, dict[int, Tensor]] = {}
        resolved = {site: site.resolve(self.model) for site in sites}
        waiting = {_address(site) for site in resolved.values()}

        def keep(place: Place) -> Tap:
            wanted = {call for where, call in waiting if where == place}

            def tap(call: int, tensor: Tensor) -> None:
                if call in wanted or None in wanted:
                    seen[place][call] = tensor.detach().clone()
                waiting.discard((place, call))
                if not waiting:
                    raise StopForward

            return tap

        for place, _ in waiting:
            seen[place] = {}
        calls: Mapping[Place, int] = {}
        taps = {place: keep(place) for place in seen}
        if sites:
            with torch.no_grad(), evaluating(self.model), tapped(self.model, taps) as calls, suppress(StopForward):
                self.forward(self.model, batch.to(self.device))
        _check_reached(resolved, calls)
        return {site: _gather(site, seen[_address(own)[0]]) for site, own in resolved.items()}

    def run(self, batch: Tensor, *, edits: Mapping[Site, Edit] = _NO_EDITS) -> Tensor:
        """What the model gives (logits, of a language model), with the tensors at some Sites replaced.

        An edit takes the tensor of its Site and returns the one to go on with, of the same shape; it is
        put back in the model's dtype. Several edits of one tensor apply in their order. Gradients flow,
        through the model and the edits, unless the caller turns them off.

        Raises:
            UnknownNameError: a Site that the model does not have.
            ShapeError: an edit that changes the shape.
            SaekitError: an edit whose call never came, or a Site that can only be read.
        """
        with evaluating(self.model), self.editing(edits):
            output = first_tensor(self.forward(self.model, batch.to(self.device)))
        if output is None:
            raise SaekitError(f"{self.name} gives no tensor; wrap it with a `forward` that returns one")
        return output

    @contextmanager
    def editing(self, edits: Mapping[Site, Edit], *, passes: Passes | None = None) -> Iterator[None]:
        """Edits as in `run`, in every forward pass while the context lasts, whoever runs the model: `generate` too.

        Calls are counted from 0 in each pass. The model's mode is left as it is. Whether each edit was
        reached is checked at the end, unless the context ends in an error or `read` stopped every pass.

        Args:
            passes: an account to keep, for edits that depend on the tokens of the pass or on its number.

        Raises:
            UnknownNameError, ShapeError, SaekitError: as in `run`; and, if `passes` is kept, no pass at all or
                a submodule that is reached by a way that does not pass through the model itself.
        """
        resolved = {site: _editable(site, site.resolve(self.model)) for site in edits}
        account = passes or Passes()

        def splice(place: Place) -> Tap:
            here = [(site, own.call) for site, own in resolved.items() if _address(own)[0] == place]

            def tap(call: int, tensor: Tensor) -> Tensor:
                if passes is not None and passes.number < 0:
                    raise SaekitError(
                        f"{place[0]} was called before {self.name} itself was, so nothing says which tokens it "
                        "works on; run the whole model by calling it"
                    )
                account.call = call
                for site, wanted in here:
                    if wanted is None or wanted == call:
                        tensor = _edited(site, edits[site], tensor)
                return tensor

            return tap

        places = {_address(own)[0] for own in resolved.values()}
        most: dict[Place, int] = {}
        with (
            tapped(self.model, {place: splice(place) for place in places}) as calls,
            watched(self.model, account, calls, most),
        ):
            yield
        if passes is not None and passes.number < 0:
            raise SaekitError(f"{self.name} was not run while edits were in place; run it inside the `with` block")
        if account.completed or account.number < 0:  # a pass that was stopped halfway says nothing about what is deeper
            _check_reached(resolved, most)


def _address(site: Site) -> tuple[Place, int | None]:
    return (site.module, site.side), site.call


def _editable(site: Site, own: Site) -> Site:
    """Refuses the one tensor that a hook can see but not replace: the stream passes by the norm that reads it."""
    if site.module.endswith("resid_mid") and not own.module.endswith("resid_mid"):
        raise SaekitError(
            f"{site} can be read but not edited here: it is seen at {own}, which the residual stream passes by; "
            "edit the block's attn_out, or its :in or :out"
        )
    return own


def _edited(site: Site, edit: Edit, tensor: Tensor) -> Tensor:
    shape = tensor.shape
    changed = edit(tensor)
    if not isinstance(changed, Tensor):
        raise SaekitError(f"the edit at {site} returned {type(changed).__name__}; return the tensor to go on with")
    if changed.shape != shape:
        raise ShapeError(
            f"the edit at {site} was given a tensor of shape {tuple(shape)} and returned {tuple(changed.shape)}; "
            "an edit keeps the shape"
        )
    return changed.to(tensor)


def _check_reached(resolved: Mapping[Site, Site], calls: Mapping[Place, int]) -> None:
    for site, own in resolved.items():
        place, call = _address(own)
        if calls[place] == 0:
            raise SaekitError(
                f"{site}: this forward pass never calls {own.module}; choose a submodule that it does call "
                "(one that runs through .forward() cannot be seen)"
            )
        if call is not None and call >= calls[place]:
            times = "once" if calls[place] == 1 else f"{calls[place]} times"
            right = "@0" if calls[place] == 1 else f"@0 to @{calls[place] - 1}"
            raise SaekitError(
                f"{site}: this forward pass calls {own.module} {times}; choose {right}, or @* for every call"
            )


def _gather(site: Site, seen: Mapping[int, Tensor]) -> Tensor:
    if site.call is not None:
        return seen[site.call]
    shapes = {tuple(tensor.shape) for tensor in seen.values()}
    if len(shapes) > 1:
        raise ShapeError(
            f"the calls at {site} differ in shape: {sorted(shapes)}; read them one by one, with @0, @1, ... for @*"
        )
    return torch.stack(list(seen.values()))
