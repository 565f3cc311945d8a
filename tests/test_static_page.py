"""The page: safe with any token, asking no server for anything, and working in a real browser."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import saekit
from saekit.activations.tokens import TokenRows
from saekit.analysis.concepts import Concept
from saekit.analysis.feature_pass import measure_features
from saekit.analysis.featured import logit_effects
from saekit.codes import SparseCodes
from saekit.dashboards import (
    PageData,
    build_page_data,
    density_histogram,
    l0_histogram,
    token_texts,
    write_page,
    zipf_plot,
)
from saekit.dashboards.feature_effect import effect_of
from saekit.dashboards.page_data import ExampleLayout, Homes
from saekit.dashboards.page_of_sae import with_effects
from saekit.dashboards.plots import (
    density_bars,
    l0_bars,
    share_bars,
    share_histogram,
    svg_density_histogram,
    svg_l0_histogram,
    svg_share_histogram,
    svg_zipf_plot,
    zipf_curve,
)
from saekit.dashboards.static_page import json_in_html, render_page
from saekit.density import ZipfFit
from saekit.errors import FileError, ShapeError
from saekit.patching.corpus_effects import CorpusEffects, ExactCheck
from saekit.patching.effects_file import KeptEffects

N_ROWS, CONTEXT, N_FEATURES, BOS = 12, 16, 8, 0
HOSTILE = [
    "<|endoftext|>",
    "</script><script>throw Error('escaped')</script>",
    "<!--",
    "&amp; \"quoted\" 'twice' `thrice` ${x}",
    "\n    ",
    "\x00\x1b\x7f\x85",
    "\ud800",
    "�",
    "\u2028\u2029\u202e\u200b",
    "]]>",
    "<img src=x onerror=\"throw Error('image')\">",
    "\\u003c\\",
]
CONCEPTS = (
    Concept("strong", "feature 0 above 0.1"),
    Concept("<b>bold</b>", "feature 0 & nothing more"),
    Concept("even", "an even position"),
)
METRICS = {"fvu": 0.0421, "l0": 3.5, "l0_p5": 1.0, "l0_p95": 6.0, "dead_fraction": 0.125, "kl": math.nan, "mine": 7.0}


def small_page(**changes) -> PageData:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, len(HOSTILE), (N_ROWS, CONTEXT), generator=generator)
    ids[:, 0] = BOS
    rows = replace(TokenRows.from_ids(ids, bos=BOS), source=torch.zeros_like(ids), names=("dir/<i>name</i>.py",))
    dense = torch.rand(N_ROWS, CONTEXT, N_FEATURES, generator=generator).sub(0.6).clamp(min=0)
    dense[:, :, 7] = 0
    even = (torch.arange(CONTEXT) % 2 == 0).expand(N_ROWS, CONTEXT)
    labels = torch.stack([dense[..., 0] > 0.1, dense[..., 0] > 0, even], dim=-1)

    def encode_rows(chosen, *, labelled=False):
        for row in chosen.tolist():
            place = torch.arange(CONTEXT)
            batch = (SparseCodes.from_dense(dense[row]), torch.full_like(place, row), place)
            yield (*batch, labels[row]) if labelled else batch

    features = torch.tensor([5, 0, 3])
    weights = torch.randn(N_FEATURES, 4, generator=generator)
    unembed = torch.randn(len(HOSTILE), 4, generator=generator)
    arguments = {
        "rows": rows,
        "encode_rows": encode_rows,
        "token_text": lambda tokens: {token: HOSTILE[token] for token in tokens},
        "model": "<model> & co",
        "site": "layers.2:out",
        "rule": "TopK(k=3)",
        "metrics": METRICS,
        "concepts": CONCEPTS,
        "effects": logit_effects(weights[features], unembed, k=4),
        "title": "</title> page",
        "layout": ExampleLayout(n_top=4, n_intervals=3, n_per_interval=2, before=5, after=3),
    }
    measured = measure_features(encode_rows(torch.arange(N_ROWS), labelled=True), n_examples=6, n_samples=12)
    return build_page_data(measured, features, **(arguments | changes))


def embedded(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


class Elements(HTMLParser):
    """Start tags and their attributes, and the text of everything that is not a script."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_every_feature_has_its_numbers_and_examples_with_the_activations_of_the_pass():
    page = small_page()
    assert [feature.feature for feature in page.features] == [5, 0, 3]
    for feature in page.features:
        titles = [group.title for group in feature.groups]
        assert titles == ["Strongest", "Percentile 67 to 100", "Percentile 33 to 67", "Percentile 0 to 33"]
        strongest = feature.groups[0].examples
        peaks = [example.window.values[example.window.position - example.window.start] for example in strongest]
        assert len(peaks) == 4
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == pytest.approx(feature.max)
        assert len({example.window.document for example in strongest}) == 4
        assert all(len(group.examples) == 2 for group in feature.groups[1:])
        assert sum(feature.histogram) == feature.active
        assert strongest[0].source == "dir/<i>name</i>.py"
    best, second, *_ = page.features[1].concepts
    assert (best.name, best.f1, best.precision, best.recall) == ("<b>bold</b>", 1.0, 1.0, 1.0)
    assert (second.name, second.recall) == ("strong", 1.0)
    assert second.precision < 1
    assert page.special == (BOS,)


def test_examples_that_read_alike_are_shown_once():
    page = small_page()
    ids = torch.full((N_ROWS, CONTEXT), 4)
    alike = small_page(rows=TokenRows.from_ids(ids), layout=ExampleLayout(n_top=4, n_intervals=3, before=0, after=0))
    assert sum(example.alike for example in page.features[0].groups[0].examples) == 0
    (only,) = alike.features[0].groups[0].examples
    assert only.alike == 5
    assert only.source == ""


def test_effects_and_concepts_that_do_not_match_are_refused():
    with pytest.raises(ShapeError, match="logit effects of 2 features for a page of 3"):
        small_page(effects=logit_effects(torch.ones(2, 4), torch.ones(9, 4), k=2))
    with pytest.raises(ShapeError, match="4 concepts for counts of 3"):
        small_page(concepts=(*CONCEPTS, CONCEPTS[0]))


def test_a_page_without_concepts_and_logits_has_neither():
    page = small_page(concepts=(), effects=None)
    assert all(not feature.concepts + feature.promoted + feature.suppressed for feature in page.features)
    assert "Percentile" in render_page(page)


def test_hostile_text_stays_text():
    html = render_page(small_page())
    found = Elements(html).found
    tags = [tag for tag, _ in found]
    assert tags.count("script") == 3
    assert tags.count("title") - tags.count("rect") - tags.count("circle") - tags.count("polyline") <= 2
    assert "img" not in tags
    assert "model" not in tags
    assert "&lt;model&gt; &amp; co" in html
    assert "&lt;/title&gt; page" in html
    data = embedded(html)
    shown = {token for feature in data["features"] for group in feature["groups"] for example in group["examples"]
             for token in example["tokens"]}  # fmt: skip
    assert len(shown) > 8
    assert all(data["tokens"][str(token)] == HOSTILE[token] for token in shown)


@pytest.mark.parametrize("text", [*HOSTILE, "<script", "<!--<script>"])
def test_json_in_html_is_plain_ascii_that_reads_back(text):
    written = json_in_html({"text": text, text: [1.5, None]})
    assert json.loads(written) == {"text": text, text: [1.5, None]}
    assert written.isascii()
    assert not set("<>&") & set(written)


def test_the_file_asks_no_server_for_anything():
    html = render_page(small_page())
    addresses = [
        value
        for _, attributes in Elements(html).found
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "action", "data", "poster"}
    ]
    assert addresses
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html
    assert len(html) < 200_000


def test_metrics_are_shown_with_their_meaning_and_unknown_ones_by_name():
    html = render_page(small_page())
    lines = dict(re.findall(r'<div data-metric="(\w+)">.*?<dd>(.*?)</dd>', html))
    assert lines["fvu"] == "0.0421"
    assert lines["l0"] == "<small>p5 1, p95 6</small> 3.5"
    assert lines["dead_fraction"] == "12.5 %"
    assert lines["kl"] == "–"
    assert lines["mine"] == "7"
    assert set(lines) == {"fvu", "l0", "dead_fraction", "kl", "mine"}
    assert re.search(r'data-metric="fvu"><dt tabindex="0" data-tip="fraction of variance unexplained', html)


def test_numbers_that_json_cannot_say_become_null():
    page = small_page()
    broken = replace(page, features=(replace(page.features[0], max=math.inf, mean=math.nan), *page.features[1:]))
    feature = embedded(render_page(broken))["features"][0]
    assert feature["max"] is None
    assert feature["mean"] is None


def test_a_page_with_no_feature_that_ever_fired_can_be_drawn():
    nothing = {"density": torch.zeros(4, dtype=torch.float64), "l0_counts": torch.tensor([9]), "zipf": None}
    html = render_page(replace(small_page(), features=(), **nothing))
    assert "4 of 4 never did" in html


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "page.html"
    assert write_page(path, small_page()) == path
    before = path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert path.stat().st_mode & 0o777 == 0o644

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FileError, match=r"cannot write .*page\.html: No space left on device; choose"):
        write_page(path, small_page(model="other"))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*choose a file in a folder"):
        write_page(tmp_path / "file" / "page.html", small_page())


def test_half_a_surrogate_pair_in_a_name_does_not_stop_the_page(tmp_path: Path):
    assert "&#55296;" in write_page(tmp_path / "page.html", small_page(title="half \ud800")).read_text("utf-8")


def test_a_token_keeps_the_space_that_its_tokenizer_drops_at_the_start_of_a_text():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁dog": 1, "s": 2}, unk_token="s"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([1]) == "dog"
    assert token_texts(wrapped, [1, 2]) == {1: " dog", 2: "s"}


def check_token_texts(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def once(upon):  a time,\n    there = was\na dog. "
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[token] for token in ids).lstrip(" ") == text
    assert any(read.startswith(" ") and read.strip() for read in texts.values())


def test_texts_of_byte_level_tokens_joined_are_the_text():
    check_token_texts(Path(saekit.__file__).parent / "assets" / "pystd")


def test_texts_of_sentencepiece_tokens_joined_are_the_text(shared_data: Path):
    check_token_texts(shared_data / "stories260K" / "hf")


def test_density_bars_count_every_living_feature_where_it_belongs():
    density = torch.tensor([0.0, 1.0, 0.5, 0.011, 0.0101, 1e-4], dtype=torch.float64)
    bars = density_bars(density)
    assert sum(bars.counts) == 5
    low = dict(zip((round(edge, 1) for edge in bars.edges), bars.counts, strict=False))
    assert low[-2.0] == 2
    assert low[-0.4] == 1
    assert low[-0.1] == 1
    assert low[-4.0] == 1
    figure = density_histogram(density)
    assert list(figure.data[0].y) == list(bars.counts)
    assert "1 of 6 never fired" in figure.layout.title.text
    assert svg_density_histogram(density).count('class="bar"') == 4


def test_features_that_fire_everywhere_have_a_bar():
    bars = density_bars(torch.tensor([1.0, 1.0, 0.0]))
    assert sum(bars.counts) == bars.counts[-1] == 2


def test_the_zipf_plot_has_the_sorted_densities_and_the_line():
    density = torch.tensor([0.01, 0.3, 0.0, 0.1])
    curve = zipf_curve(density)
    assert curve.ranks == (1, 2, 3)
    assert curve.densities == pytest.approx((0.3, 0.1, 0.01))
    fit = ZipfFit(exponent=2.0, offset=1.0, scale=0.8)
    figure = zipf_plot(density, fit)
    assert list(figure.data[0].y) == pytest.approx([0.3, 0.1, 0.01])
    assert list(figure.data[1].y) == pytest.approx([0.2, 0.8 / 9, 0.05])
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert len(zipf_plot(density).data) == 1
    drawn = svg_zipf_plot(density, fit)
    assert drawn.count("<circle") == 3
    assert drawn.count("<polyline") == 1
    assert "rank 2: density 0.1" in drawn


def test_points_of_the_zipf_plot_stay_few_and_reach_both_ends():
    curve = zipf_curve(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert len(curve.ranks) <= 160
    assert (curve.ranks[0], curve.ranks[-1]) == (1, 20_000)


@pytest.mark.parametrize("spread", [1, 40, 500])
def test_l0_bars_count_every_token_and_the_mean_is_marked(spread: int):
    counts = torch.zeros(600, dtype=torch.int64)
    sizes = torch.arange(20, 20 + spread)
    counts[sizes] = sizes - 17  # rising, so that a bar in the wrong place moves the mean
    mean_l0 = float((counts * torch.arange(600)).sum() / counts.sum())
    bars = l0_bars(counts)
    assert sum(bars.counts) == int(counts.sum())
    assert len(bars.counts) <= 60
    assert f"mean L0 {mean_l0:.2f}" in svg_l0_histogram(counts)
    middles, heights = l0_histogram(counts).data[0].x, l0_histogram(counts).data[0].y
    mean = sum(x * y for x, y in zip(middles, heights, strict=True)) / sum(heights)
    assert mean == pytest.approx(mean_l0, abs=5)
    if spread == 1:
        assert middles[heights.index(3)] == 20


def test_share_bars_count_every_feature_both_ends_included():
    share = torch.tensor([0.0, 0.049, 0.05, 0.5, 1.0, 1.0000001])
    bars = share_bars(share)
    assert len(bars.counts) == 20 and bars.edges[-1] == 1
    assert {place: n for place, n in enumerate(bars.counts) if n} == {0: 2, 1: 1, 10: 1, 19: 2}
    figure = share_histogram(share, "layers.1:out")
    assert list(figure.data[0].y) == list(bars.counts) and figure.layout.xaxis.title.text == "share at layers.1:out"
    drawn = svg_share_histogram(share, "a<b")
    assert drawn.count('class="bar"') == 4 and "95 to 100 %: 2 features" in drawn and "share at a&lt;b" in drawn


CHROMIUM = shutil.which("chromium")


def seen_in_browser(folder: Path, where: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
        (folder / "page.html").as_uri() + where,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_the_feature_of_the_link_without_errors(tmp_path: Path):
    page = small_page()
    write_page(tmp_path / "page.html", page)
    dom = seen_in_browser(tmp_path, "#feature=3")
    assert "data-error" not in dom.split("<head>")[0]
    assert "data-ready" in dom.split("<head>")[0]
    assert 'data-feature="3"' in re.search(r"<body[^>]*>", dom)[0]
    article = re.search(r'<article id="feature">(.*?)</article>', dom, re.DOTALL)[1]
    assert re.search(r"<h1[^>]*>Feature 3 ", article)
    windows = [example.window for group in page.features[2].groups for example in group.examples]
    drawn = [re.findall(r'<span class="t( on)?( peak)?', part) for part in article.split('class="example"')[1:]]
    assert len(drawn) == len(windows)
    for tokens, window in zip(drawn, windows, strict=True):
        peak = window.position - window.start
        assert [bool(on) for on, _ in tokens] == [value > 0 for value in window.values]
        assert [place for place, (_, is_peak) in enumerate(tokens) if is_peak] == [peak]
    assert "&lt;/script&gt;" in article
    assert "<img" not in dom
    assert "\u202e" not in article
    assert re.search(r'<section id="overview" hidden', dom)
    assert dom.count('aria-current="page"') == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_the_overview_and_says_when_a_feature_has_no_page(tmp_path: Path):
    write_page(tmp_path / "page.html", small_page())
    dom = seen_in_browser(tmp_path, "")
    assert "data-error" not in dom.split("<head>")[0]
    assert '<section id="overview">' in dom
    assert re.search(r'<article id="feature" hidden', dom)
    assert "3 of 3 features" in dom
    assert len(re.findall(r'<a href="#feature=\d+"', dom)) == 3
    missing = seen_in_browser(tmp_path, "#feature=77")
    assert "data-error" not in missing.split("<head>")[0]
    assert "Feature 77 has no page here" in missing


def page_with_homes(*sites: str) -> PageData:
    """Feature f writes f eighths of itself at the last Site; each Site has an FVU, and the last a loss too."""
    last = torch.arange(N_FEATURES) / N_FEATURES
    shares = torch.stack([*[(1 - last) / (len(sites) - 1)] * (len(sites) - 1), last], dim=1)
    metrics = {site: {"fvu": 0.125, "own_fraction": 0.25, "predicted": 9} for site in sites}
    metrics[sites[-1]]["ce_sae"] = 2.5
    return replace(small_page(), homes=Homes(sites=sites, shares=shares, metrics=metrics))


def test_of_a_crosscoder_the_page_says_where_features_live():
    html = render_page(page_with_homes("<i>a</i>", "b", "c"))
    assert [feature["shares"] for feature in embedded(html)["features"]] == [
        [0.1875, 0.1875, 0.625],
        [0.5, 0.5, 0.0],
        [0.3125, 0.3125, 0.375],
    ]
    table = re.search(r'<section class="card by-site">(.*?)</section>', html, re.DOTALL)[1]
    rows = re.findall(r'<tr data-metric="(\w+)">.*?</th>(.*?)</tr>', table)
    assert {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in rows} == {
        "fvu": ["0.125"] * 3,
        "own_fraction": ["25 %"] * 3,
        "ce_sae": ["–", "–", "2.5"],
    }
    assert html.count("<h2>Where features live</h2>") == 3 and "<i>a</i>" not in html
    # the plots of two Sites would be mirror images; features that never fired are in none
    of_two = re.search(r"Where features live.*?</figure>", render_page(page_with_homes("a", "b")), re.DOTALL)[0]
    assert "share at b" in of_two and "share at a" not in of_two
    assert of_two.count('class="bar"') == N_FEATURES - 1
    plain = render_page(small_page())
    assert "Where features live" not in plain and "by-site" not in plain.partition("</style>")[2]
    assert all(feature["shares"] == [] for feature in embedded(plain)["features"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_where_a_feature_lives_and_nothing_of_it_for_one_site(tmp_path: Path):
    write_page(tmp_path / "page.html", page_with_homes("layers.0:out", "layers.2:out"))
    dom = seen_in_browser(tmp_path, "#feature=3")
    assert "data-error" not in dom.split("<head>")[0]
    card = re.search(r'<section class="card home-card">(.*?)</section>', dom, re.DOTALL)[1]
    assert re.findall(r'class="name">(.*?)<', card) == ["layers.0:out", "layers.2:out"]
    assert re.findall(r"<b>(.*?)</b>", card) == ["62.5 %", "37.5 %"]
    assert "by what it writes at layers.2:out" in dom
    assert 'value="share-1"' in dom
    write_page(tmp_path / "page.html", small_page())
    plain = seen_in_browser(tmp_path, "#feature=3")
    assert (
        'class="card home-card"' not in plain
        and 'value="share-' not in plain
        and "by what it writes" not in (re.search(r'<article id="feature">(.*?)</article>', plain, re.DOTALL)[1])
    )


def measured_effects() -> KeptEffects:
    """Of 8 features, the last never active; 0 and 6 are checked."""
    steps = torch.arange(N_FEATURES, dtype=torch.float64)
    active = torch.tensor([9] * 7 + [0])
    effects = CorpusEffects(steps / 10, steps / 20, steps / 5, steps / 100, active, rows=3)
    check = ExactCheck(
        torch.tensor([0, 6]),
        torch.tensor([0.5, 0.75], dtype=torch.float64),
        torch.tensor([0.625, 0.875], dtype=torch.float64),
        rank_correlation=0.91,
        slope=1.25,
    )
    return KeptEffects(effects, check, {})


def test_an_effect_is_shown_with_its_exact_check_or_not_at_all():
    shown = {page.feature: page.effect for page in with_effects(small_page(), measured_effects()).features}
    assert (shown[5].attributed, shown[5].low, shown[5].high, shown[5].random) == (0.5, 0.25, 1.0, 0.05)
    assert (shown[5].exact, shown[5].on_checked) == (None, None)
    assert (shown[0].exact, shown[0].on_checked) == (0.625, 0.5)
    assert {(one.rank_correlation, one.slope, one.checked) for one in shown.values()} == {(0.91, 1.25, 2)}
    assert effect_of(measured_effects(), 7) is None
    assert 'value="effect"' in render_page(with_effects(small_page(), measured_effects()))
    assert 'value="effect"' not in render_page(small_page())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_a_browser_shows_the_effect_of_a_feature_and_how_far_to_trust_it(tmp_path: Path):
    write_page(tmp_path / "page.html", with_effects(small_page(), measured_effects()))
    checked, unchecked = (seen_in_browser(tmp_path, f"#feature={feature}") for feature in (0, 5))
    assert "data-error" not in checked.split("<head>")[0]
    assert "+0.625" in checked and "not among them" not in checked.partition("<article")[2].partition("<script")[0]
    article = unchecked.partition("<article")[2].partition("</article>")[0]
    assert "+0.5" in article and "+0.25 to +1" in article and "not among them" in article
    assert "rank correlation 0.91, and exact is 1.3 times the estimate" in article
