"""Train sparse autoencoders on a model's activations, see what the features mean, and prove what they do."""

from saekit.codes import SparseCodes as SparseCodes
from saekit.errors import SaekitError as SaekitError
from saekit.loading import load as load
from saekit.sae import SAE as SAE
from saekit.selection import FeatureChoice as FeatureChoice
from saekit.selection import MutualChoice as MutualChoice
from saekit.selection import Threshold as Threshold
from saekit.selection import TopK as TopK
from saekit.targets import Site as Site
from saekit.targets import Target as Target
