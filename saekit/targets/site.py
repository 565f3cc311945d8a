"""The name of one tensor of a forward pass."""

import re
from dataclasses import dataclass, replace

from torch import nn

from saekit.errors import SaekitError
from saekit.targets.names import Side, find_place, first_name

__all__ = ["Side", "Site"]

_NAME = r"[^\s:@.]+(?:\.[^\s:@.]+)*"
_SITE = re.compile(rf"(?P<module>{_NAME})(?::(?P<side>in|out))?(?:@(?P<call>[0-9]+|\*))?")
_EXPECTED = "expected a submodule, then :in or :out, then @ and a call, as in layers.6, layers.6.mlp:in, layers.6:out@2"


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor of a forward pass: the input or output of a submodule.

    `str(site)` is the only string form, used in file names, logs and the pretrained index, and
    `Site.parse` is its inverse: `layers.6.mlp:in`, `layers.6.mlp:out@2`, `layers.6.mlp:out@*`. When read,
    a missing side means `:out`; read or written, a missing call means `@0`. Code passes `Site`, never the string.

    Attributes:
        module: a submodule's name in any spelling that `resolve` understands.
        side: its input (the first tensor it takes) or its output (the first tensor it gives).
        call: which call, counted from 0 in each forward pass, of a module that runs several times; None
            stands for every call.
    """

    module: str
    side: Side = Side.OUTPUT
    call: int | None = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.module) or (self.call is not None and self.call < 0):
            raise SaekitError(f"no site can be at {self.module!r}, call {self.call}; {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The Site that a string names.

        Raises:
            SaekitError: not the spelling of a Site. Whether a model has such a submodule is `resolve`'s concern.
        """
        found = _SITE.fullmatch(text)
        if found is None:
            raise SaekitError(f"cannot read site {text!r}; {_EXPECTED}")
        call = None if found["call"] == "*" else int(found["call"] or 0)
        return cls(found["module"], Side(found["side"] or "out"), call)

    def __str__(self) -> str:
        call = "@*" if self.call is None else f"@{self.call}" if self.call else ""
        return f"{self.module}:{self.side}{call}"

    def __lt__(self, other: "Site") -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[str, Side, int]:
        return self.module, self.side, -1 if self.call is None else self.call

    def resolve(self, model: nn.Module) -> "Site":
        """The same Site under the model's own name for the submodule.

        A name may be exact, the unambiguous end of one, or in the manner of TransformerLens or Hugging
        Face on a model that uses the other; `blocks.6.hook_resid_pre` becomes `model.layers.6:in`.

        Raises:
            UnknownNameError: no such submodule or layer; it lists the closest names.
            SaekitError: a name that fits several submodules, a tensor that this model does not compute, or a later
                place of a list that holds one module at several, whose calls only @ tells apart.
        """
        module, side = find_place(model, self.module, self.side)
        first, call = first_name(model, module)
        if call and self.call == 0:
            raise SaekitError(
                f"{module} is {first} once more, and {self} would be its first call; "
                f"the call that {module} stands for is {Site(first, side, call)}"
            )
        return replace(self, module=module, side=side)
