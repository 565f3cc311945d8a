"""What is interpreted: a `Target` runs a model and hands out, or replaces, the tensors at its `Site`s."""

from saekit.targets.site import Side as Side
from saekit.targets.site import Site as Site
from saekit.targets.target import Target as Target
