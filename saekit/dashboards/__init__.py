"""Looking at an SAE: curves for notebooks, and one self-contained page of its features."""

from saekit.dashboards.page_data import PageData, build_page_data, token_texts
from saekit.dashboards.plots import density_histogram, l0_histogram, share_histogram, zipf_plot
from saekit.dashboards.static_page import write_page

__all__ = [
    "PageData",
    "build_page_data",
    "density_histogram",
    "l0_histogram",
    "share_histogram",
    "token_texts",
    "write_page",
    "zipf_plot",
]
