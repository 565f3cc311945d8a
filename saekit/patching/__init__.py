"""Causality: edit features inside the forward pass and measure what follows."""

from saekit.patching.cache import SpliceCache as SpliceCache
from saekit.patching.cache import run_with_cache_with_saes as run_with_cache_with_saes
from saekit.patching.splice import run_with_saes as run_with_saes
from saekit.patching.splice import spliced as spliced
from saekit.patching.tokens import TokenMask as TokenMask
