"""What spliced SAEs saw in one forward pass, under the names that the field knows.

    blocks.8.hook_resid_pre.hook_sae_input        what the model computed
                            hook_sae_acts_pre     encoder pre-activations, `(..., n_features)`
                            hook_sae_acts_post    codes, after edits, `(..., n_features)`
                            hook_sae_recons       their decoding
                            hook_sae_error        input minus the reconstruction before edits
                            hook_sae_output       what the model went on with

Only sparse codes are kept; a dense tensor is made when it is asked for, each time anew. At a token that
the mask leaves out the activations are 0, the reconstruction is the input and the error 0, so that
reconstruction + error = output everywhere. Of a transcoder, reconstruction, error and output are of the tensor
that it writes, and stand under the Site that it reads.
"""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import SaekitError, UnknownNameError
from saekit.kernels.reference import pre_acts
from saekit.patching.splice import SAEs, Seen, spliced, write
from saekit.patching.tokens import TokenMask
from saekit.targets import Side, Site, Target


class SpliceCache(Mapping[str, Tensor]):
    """Read-only mapping from `<site>.hook_sae_...` to tensors; `<site>` in any spelling that the model understands.

    Attributes:
        seen: the same with sparse codes, by Site as it was named for splicing and with its call.
    """

    def __init__(self, target: Target, seen: Mapping[Site, Seen], *, use_error_term: bool):
        self.seen = seen
        self._model = target.model
        self._use_error_term = use_error_term

    def __getitem__(self, key: str) -> Tensor:
        prefix, dot, name = key.rpartition(".hook_sae_")
        seen = self._find(prefix) if dot and f"hook_sae_{name}" in _ENTRIES else None
        if seen is None:
            raise UnknownNameError("cache entry", key, self)
        if name == "error" and not self._use_error_term:
            raise SaekitError(f"{key}: there was no error term in this pass; run with use_error_term=True")
        return _ENTRIES[f"hook_sae_{name}"](seen)

    def __iter__(self) -> Iterator[str]:
        names = [name for name in _ENTRIES if self._use_error_term or name != "hook_sae_error"]
        return (f"{cache_name(site)}.{name}" for site in self.seen for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _find(self, prefix: str) -> Seen | None:
        try:
            wanted = Site.parse(prefix).resolve(self._model)
        except SaekitError:
            return None
        return next((seen for site, seen in self.seen.items() if site.resolve(self._model) == wanted), None)


def cache_name(site: Site) -> str:
    """The Site without what goes without saying: `blocks.8.hook_resid_pre`, `layers.2:in`, `core@1`."""
    side = "" if site.side is Side.OUTPUT else f":{site.side}"
    return f"{site.module}{side}{f'@{site.call}' if site.call else ''}"


def run_with_cache_with_saes(
    target: Target,
    batch: Tensor,
    saes: SAEs,
    *,
    use_error_term: bool = True,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
) -> tuple[Tensor, SpliceCache]:
    """What the model gives with SAEs spliced in, and what they saw; arguments and errors as for `spliced`.

    A Site of every call (`@*`) has an entry per call, `@1` in its name for the second.
    """
    seen: dict[Site, Seen] = {}
    with spliced(target, saes, use_error_term=use_error_term, mask=mask, on_seen=lambda s: seen.update({s.site: s})):
        output = target.run(batch)
    return output, SpliceCache(target, seen, use_error_term=use_error_term)


def _acts_pre(seen: Seen) -> Tensor:
    sae = seen.sae
    prepared, scale = sae.prepare(_rows(seen))
    dense = pre_acts(prepared, sae.encoder, sae.b_enc)
    return _on_grid(seen, dense if scale is None else dense * scale)


def _acts_post(seen: Seen) -> Tensor:
    dense = seen.codes.to_dense()
    return _on_grid(seen, dense if seen.added is None else dense + seen.added.to_dense())


def _recons(seen: Seen) -> Tensor:
    rows = _rows(seen)
    decoded = seen.sae.decode(seen.codes, rows)
    return _over_output(seen, decoded if seen.added is None else decoded + write(seen.added, seen.sae, rows))


def _error(seen: Seen) -> Tensor:
    clean = _over_output(seen, seen.sae.decode(seen.codes, _rows(seen)))
    return (seen.y - clean).detach()


_ENTRIES: dict[str, Callable[[Seen], Tensor]] = {
    "hook_sae_input": lambda seen: seen.x,
    "hook_sae_acts_pre": _acts_pre,
    "hook_sae_acts_post": _acts_post,
    "hook_sae_recons": _recons,
    "hook_sae_error": _error,
    "hook_sae_output": lambda seen: seen.output,
}


def _rows(seen: Seen) -> Tensor:
    return seen.x[_kept(seen)].to(seen.sae.b_dec)


def _kept(seen: Seen) -> Tensor:
    return seen.grid.keep.reshape(seen.x.shape[:-1])


def _on_grid(seen: Seen, rows: Tensor) -> Tensor:
    """Rows of the tokens that count at their places, 0 elsewhere."""
    return rows.new_zeros(*seen.x.shape[:-1], rows.shape[1]).index_put((_kept(seen),), rows)


def _over_output(seen: Seen, rows: Tensor) -> Tensor:
    return seen.y.index_put((_kept(seen),), rows.to(seen.y))
