"""Causality: edit features inside the forward pass and measure what follows."""

from saekit.patching.cache import SpliceCache as SpliceCache
from saekit.patching.cache import run_with_cache_with_saes as run_with_cache_with_saes
from saekit.patching.intervening import intervening as intervening
from saekit.patching.intervening import run_with_interventions as run_with_interventions
from saekit.patching.intervention import AllBut as AllBut
from saekit.patching.intervention import Intervention as Intervention
from saekit.patching.intervention import OffDistributionWarning as OffDistributionWarning
from saekit.patching.intervention import When as When
from saekit.patching.operation import Add as Add
from saekit.patching.operation import Clamp as Clamp
from saekit.patching.operation import Mean as Mean
from saekit.patching.operation import ReplaceFrom as ReplaceFrom
from saekit.patching.operation import Resample as Resample
from saekit.patching.operation import Scale as Scale
from saekit.patching.operation import Zero as Zero
from saekit.patching.splice import run_with_saes as run_with_saes
from saekit.patching.splice import spliced as spliced
from saekit.patching.tokens import TokenMask as TokenMask
