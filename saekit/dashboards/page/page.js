"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const features = new Map(data.features.map((feature) => [feature.feature, feature]));
const shown = { full: false, breaks: true };
let order = data.features;

/* ---- small tools: text is only ever set as text, never as markup */

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const tokenText = (id) => data.tokens[id] ?? "";

// characters that cannot be seen, or that would rearrange their neighbours, become signs
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad]|\p{Cf}|\p{Cs}|\p{Co}|\u2028|\u2029/gu;
function sign(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "\u2421";
  return "\\u{" + code.toString(16) + "}";
}
const readable = (text) => text.replace(UNSEEN, sign);
const inline = (text) => readable(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(digits)));
}
const percent = (share) => number(share * 100, 3) + " %";

function chip(id) {
  const text = tokenText(id);
  const node = el("span", { class: "chip", "data-tip": `token ${id}\n${JSON.stringify(text)}` });
  // spaces at the ends and in a row could not be counted otherwise
  for (const piece of inline(text).split(/(^ +| +$| {2,}|[⏎⇥]+)/)) {
    if (!piece) continue;
    const spaces = piece.trim() ? 0 : piece.length;
    if (spaces) node.append(el("span", { class: "sign" }, spaces > 1 ? `␣${spaces}` : "␣"));
    else node.append(/^[⏎⇥]/.test(piece) ? el("span", { class: "sign" }, piece) : piece);
  }
  if (!text) node.append("∅");
  return node;
}

/* ---- what the list shows of a feature */

for (const feature of data.features) {
  const counts = new Map();
  for (const example of feature.groups[0]?.examples ?? []) {
    const id = example.tokens[example.peak];
    counts.set(id, (counts.get(id) ?? 0) + 1);
  }
  feature.peaks = [...counts].sort((a, b) => b[1] - a[1]);
  const told = feature.concepts.filter((concept) => concept.f1 >= data.lowest_f1);
  feature.best = told[0];
  const words = told.map((concept) => concept.name);
  const ids = [...feature.peaks.map((peak) => peak[0]), ...feature.promoted.map((pair) => pair[0])];
  feature.words = ["#" + feature.feature, ...words, ...ids.map(tokenText)].join("\n").toLowerCase();
}

const sorts = {
  page: null,
  number: (a, b) => a.feature - b.feature,
  concept: (a, b) => (a.best ? 0 : 1) - (b.best ? 0 : 1) || (a.best?.name ?? "").localeCompare(b.best?.name ?? ""),
  f1: (a, b) => (b.best?.f1 ?? 0) - (a.best?.f1 ?? 0),
  dense: (a, b) => b.density - a.density,
  rare: (a, b) => a.density - b.density,
  max: (a, b) => b.max - a.max,
  ...Object.fromEntries(data.sites.map((_, at) => [`share-${at}`, (a, b) => b.shares[at] - a.shares[at]])),
  effect: (a, b) => (b.effect?.attributed ?? -Infinity) - (a.effect?.attributed ?? -Infinity),
};

function matches(feature, term) {
  const bound = term.match(/^(?:density)?([<>])([\d.]+(?:e-?\d+)?)(%?)$/);
  if (!bound) return feature.words.includes(term);
  const limit = Number(bound[2]) / (bound[3] ? 100 : 1);
  return bound[1] === "<" ? feature.density < limit : feature.density > limit;
}

function drawList() {
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const compare = sorts[byId("sort").value];
  order = data.features.filter((feature) => terms.every((term) => matches(feature, term)));
  if (compare) order = [...order].sort(compare);
  byId("found").textContent = `${order.length} of ${data.features.length} features`;
  byId("list").replaceChildren(...order.map(listItem));
  markCurrent();
}

function listItem(feature) {
  const name = feature.best
    ? el("span", { class: "name" }, feature.best.name)
    : el("span", { class: "name none" }, "no concept");
  return el("li", {}, el("a", { href: "#feature=" + feature.feature, "data-feature": feature.feature },
    el("span", { class: "number" }, "#" + feature.feature), name,
    el("span", { class: "density" }, percent(feature.density)),
    el("span", { class: "peaks" }, ...feature.peaks.slice(0, 4).map((peak) => chip(peak[0])))));
}

function markCurrent() {
  const current = currentFeature();
  for (const link of byId("list").querySelectorAll("a")) {
    if (Number(link.dataset.feature) === current) {
      link.setAttribute("aria-current", "page");
      keepInView(byId("list"), link);
    } else {
      link.removeAttribute("aria-current");
    }
  }
}

// scrollIntoView would scroll the page as well
function keepInView(box, item) {
  const [frame, place] = [box.getBoundingClientRect(), item.getBoundingClientRect()];
  if (place.top < frame.top) box.scrollTop -= frame.top - place.top + 8;
  else if (place.bottom > frame.bottom) box.scrollTop += place.bottom - frame.bottom + 8;
}

/* ---- a feature's page */

function currentFeature() {
  const found = location.hash.match(/^#feature=(\d+)$/);
  return found ? Number(found[1]) : null;
}

function step(by) {
  if (!order.length) return;
  const at = order.findIndex((feature) => feature.feature === currentFeature());
  const next = at < 0 ? (by > 0 ? 0 : order.length - 1) : (at + by + order.length) % order.length;
  location.hash = "feature=" + order[next].feature;
}

function route(event) {
  const wanted = currentFeature();
  const feature = features.get(wanted);
  const page = byId("feature");
  byId("overview").hidden = wanted !== null;
  page.hidden = wanted === null;
  document.body.classList.toggle("at-feature", wanted !== null);
  document.body.dataset.feature = feature ? feature.feature : "";
  document.title = feature ? `#${feature.feature} ${feature.best?.name ?? ""} · ${data.title}` : data.title;
  hideTip();
  if (feature) page.replaceChildren(...featurePage(feature));
  else if (wanted !== null) page.replaceChildren(...missingPage(wanted));
  markCurrent();
  if (event) {
    scrollTo(0, 0);
    (wanted === null ? byId("main") : page.querySelector("h1")).focus({ preventScroll: true });
  }
}

function missingPage(wanted) {
  return [
    el("a", { class: "back", href: "#" }, "← overview and list"),
    el("h1", { tabindex: "-1" }, `Feature ${wanted} has no page here`),
    el("p", { class: "says" }, `This file holds ${data.features.length} of ${data.n_features.toLocaleString("en")} features.`),
  ];
}

function featurePage(feature) {
  const title = el("h1", { tabindex: "-1" }, `Feature ${feature.feature} `,
    el("span", {}, feature.best ? `${feature.best.name}, F1 ${feature.best.f1.toFixed(2)}` : "no concept"));
  const previous = el("button", { type: "button", "data-tip": "previous (←)" }, "← previous");
  const next = el("button", { type: "button", "data-tip": "next (→)" }, "next →");
  previous.onclick = () => step(-1);
  next.onclick = () => step(1);
  const head = el("header", { class: "head" },
    el("a", { class: "back", href: "#" }, "← overview and list"), title, el("div", { class: "steps" }, previous, next));
  const left = el("div", { class: "stack" }, activationCard(feature));
  const right = el("div", { class: "stack" });
  // two columns of about one height, with or without logits
  (feature.promoted.length ? left : right).append(conceptCard(feature));
  if (feature.shares.length) right.append(homeCard(feature));
  if (feature.promoted.length) right.append(logitCard(feature));
  if (feature.effect) right.append(effectCard(feature.effect));
  return [head, summary(feature), el("div", { class: "panels" }, left, right), exampleCard(feature)];
}

function summary(feature) {
  const total = feature.peaks.reduce((sum, peak) => sum + peak[1], 0);
  const says = el("p", { class: "says" });
  if (!total) return says;
  says.append("Strongest on ");
  for (const [id, count] of feature.peaks.slice(0, 5)) says.append(chip(id), ` ${count}/${total} `);
  const others = feature.peaks.length - 5;
  if (others > 0) says.append(`and ${others} other ${others > 1 ? "tokens" : "token"}`);
  return says;
}

function statistic(name, value, tip) {
  return el("div", {}, el("dt", { "data-tip": tip, tabindex: "0" }, name), el("dd", {}, value));
}

function activationCard(feature) {
  const stats = el("dl", { class: "stats" },
    statistic("density", percent(feature.density), "share of tokens the feature is active on"),
    statistic("tokens", feature.active.toLocaleString("en"), "tokens the feature is active on"),
    statistic("mean", number(feature.mean), "mean activation over these tokens"),
    statistic("deviation", number(feature.deviation), "standard deviation over these tokens"),
    statistic("max", number(feature.max), "largest activation"));
  const chart = el("div");
  chart.innerHTML = histogram(feature); // numbers only
  return el("section", { class: "card" }, el("h2", {}, "Activations"), stats, chart);
}

function histogram({ histogram: counts, bin_width: width }) {
  const [w, h, left, bottom, top] = [440, 170, 54, 40, 10];
  const used = counts.findLastIndex((count) => count > 0) + 1;
  if (!used) return "";
  const most = Math.max(...counts);
  const ticks = (high, atMost) => {
    const rough = high / atMost;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= rough);
    return Array.from({ length: Math.floor(high / gap + 1e-9) + 1 }, (_, i) => i * gap);
  };
  const x = (value) => left + (value / (used * width)) * (w - left - 12);
  const y = (count) => h - bottom - (count / most) * (h - bottom - top);
  const parts = [];
  for (const count of ticks(most, 4).filter(Number.isInteger)) {
    const at = y(count).toFixed(1);
    const label = count.toLocaleString("en");
    parts.push(`<line class="grid" x1="${left}" x2="${w - 12}" y1="${at}" y2="${at}"/><text class="y" x="${left - 7}" y="${at}" dy="0.32em">${label}</text>`);
  }
  counts.slice(0, used).forEach((count, place) => {
    if (!count) return;
    const height = Math.max(h - bottom - y(count), 1.2);
    const low = place * width;
    parts.push(`<rect class="bar" x="${(x(low) + 0.4).toFixed(1)}" width="${Math.max(x(low + width) - x(low) - 0.8, 0.8).toFixed(1)}" y="${(h - bottom - height).toFixed(1)}" height="${height.toFixed(1)}"><title>${number(low)} to ${number(low + width)}: ${count.toLocaleString("en")} tokens</title></rect>`);
  });
  for (const value of ticks(used * width, 6)) {
    parts.push(`<text class="x" x="${x(value).toFixed(1)}" y="${h - bottom + 16}">${number(value)}</text>`);
  }
  parts.push(`<line class="axis" x1="${left}" x2="${w - 12}" y1="${h - bottom}" y2="${h - bottom}"/><text class="x" x="${(left + w - 12) / 2}" y="${h - 5}">activation</text>`);
  return `<svg class="plot" viewBox="0 0 ${w} ${h}" role="img" aria-label="histogram of activations">${parts.join("")}</svg>`;
}

function conceptCard(feature) {
  const card = el("section", { class: "card" }, el("h2", {}, "Concepts"));
  if (!feature.concepts.length) {
    card.append(el("p", { class: "says" }, "No labelled concept goes with this feature."));
    return card;
  }
  const grid = el("div", { class: "concepts" }, el("span", { class: "label" }, ""),
    el("span", { class: "label", tabindex: "0", "data-tip": "share of the feature's tokens that carry the concept" }, "precision"),
    el("span", { class: "label", tabindex: "0", "data-tip": "share of the concept's tokens that the feature is active on" }, "recall"),
    el("span", { class: "label", tabindex: "0", "data-tip": "harmonic mean of precision and recall" }, "F1"));
  for (const concept of feature.concepts) {
    grid.append(el("span", { class: "name", tabindex: "0", "data-tip": concept.description || concept.name }, concept.name));
    for (const key of ["precision", "recall", "f1"]) {
      const share = concept[key];
      grid.append(el("span", { class: "meter " + key }, el("i", { style: `width:${share * 100}%` }), el("b", {}, share.toFixed(2))));
    }
  }
  card.append(grid);
  return card;
}

function homeCard(feature) {
  const grid = el("div", { class: "homes" });
  feature.shares.forEach((share, at) => grid.append(el("span", { class: "name" }, data.sites[at]),
    el("span", { class: "meter" }, el("i", { style: `width:${share * 100}%` }), el("b", {}, percent(share)))));
  return el("section", { class: "card home-card" },
    el("h2", { tabindex: "0", "data-tip": "share of its squared decoder norm that the feature writes at each Site, in units of what is usual there" }, "Where it lives"), grid);
}

function logitCard(feature) {
  const from = data.sites.length ? `, by what it writes at ${data.sites.at(-1)}` : "";
  const column = (title, kind, pairs) => el("div", { class: kind }, el("h3", {}, title), el("ol", {},
    ...pairs.map(([id, value]) => el("li", {}, chip(id), el("span", { class: "value" }, (value > 0 ? "+" : "") + value.toFixed(2))))));
  return el("section", { class: "card logit-card" },
    el("h2", { tabindex: "0", "data-tip": "what one unit of activation adds to a token's logit if the layers above pass it on unchanged" + from }, "Tokens it speaks for and against"),
    el("div", { class: "logits" }, column("promoted", "up", feature.promoted), column("suppressed", "down", feature.suppressed)));
}

function effectCard(effect) {
  const nats = (value) => (value > 0 ? "+" : "") + number(value);
  const stats = el("dl", { class: "stats" },
    statistic("attributed", nats(effect.attributed), "estimated from gradients and the curvature of the loss"),
    statistic("95 %", `${nats(effect.low)} to ${nats(effect.high)}`, "interval over rows of text"),
    statistic("random", nats(effect.random), "the same of a random direction, as often active and as long"));
  if (effect.exact !== null) {
    stats.append(statistic("exact", nats(effect.exact), `zeroed for real on some rows, where the estimate is ${nats(effect.on_checked)}`));
  }
  const of = `Over ${effect.checked} features that were zeroed for real, estimate and exact effect have rank correlation ${number(effect.rank_correlation, 2)}, and exact is ${number(effect.slope, 2)} times the estimate.`;
  return el("section", { class: "card effect-card" },
    el("h2", { tabindex: "0", "data-tip": "by how many nats the loss rises when the feature is zeroed, per token on which it is active" }, "Effect on the loss"),
    stats, el("p", { class: "says" }, of + (effect.exact === null ? " This feature is not among them." : "")));
}

/* ---- examples */

function exampleCard(feature) {
  const groups = el("div");
  const draw = () => {
    groups.className = shown.breaks ? "" : "flat";
    groups.replaceChildren(...feature.groups.map((group) => exampleGroup(feature, group)));
  };
  const toggle = (name, off, on) => {
    const button = el("button", { type: "button", "aria-pressed": String(shown[name]) }, shown[name] ? on : off);
    button.onclick = () => {
      shown[name] = !shown[name];
      button.setAttribute("aria-pressed", String(shown[name]));
      button.textContent = shown[name] ? on : off;
      draw();
    };
    return button;
  };
  draw();
  return el("section", { class: "card examples" },
    el("div", { class: "bar-of-tools" }, el("h2", {}, "Examples"),
      el("div", { class: "toggles" }, toggle("full", "full context", "full context"), toggle("breaks", "line breaks", "line breaks"))),
    groups);
}

function exampleGroup(feature, group) {
  const values = group.examples.map((example) => example.value);
  const range = ` at ${number(Math.max(...values))} to ${number(Math.min(...values))}`;
  return el("section", { class: "group" }, el("h3", {}, el("b", {}, group.title), range),
    ...group.examples.map((example) => exampleRow(feature, example)));
}

function exampleRow(feature, example) {
  const [before, after] = shown.full ? [Infinity, Infinity] : [data.snippet[0], data.snippet[1]];
  const first = Math.max(0, example.peak - before);
  const last = Math.min(example.tokens.length - 1, example.peak + after);
  const code = el("pre", { class: "code" });
  if (first > 0 || example.start > 0) code.append(el("span", { class: "sign" }, "… "));
  for (let place = first; place <= last; place++) code.append(tokenSpan(feature, example, place));
  if (last < example.tokens.length - 1) code.append(el("span", { class: "sign" }, " …"));
  const where = [example.source, `row ${example.document}, token ${example.start + example.peak}`];
  if (example.alike) where.push(`${example.alike} more alike`);
  return el("div", { class: "example" },
    el("div", { class: "strength" }, number(example.value), el("i", { style: `width:${Math.min(100, (100 * Math.abs(example.value)) / feature.max)}%` })),
    code, el("div", { class: "where" }, where.filter(Boolean).join(" · ")));
}

function tokenSpan(feature, example, place) {
  const id = example.tokens[place];
  const value = example.values[place] ?? 0;
  const classes = ["t"];
  if (value !== 0) classes.push("on");
  if (place === example.peak) classes.push("peak");
  if (data.special.includes(id)) classes.push("special");
  const span = el("span", { class: classes.join(" ") });
  if (value !== 0) span.style.setProperty("--a", (0.12 + 0.7 * Math.min(1, Math.abs(value) / feature.max)).toFixed(3));
  const pieces = readable(tokenText(id)).split("\n");
  pieces.forEach((piece, i) => {
    if (i) span.append(el("span", { class: "sign" }, "⏎"), el("span", { class: "break" }, "\n"));
    span.append(piece);
  });
  span.tip = () => `${JSON.stringify(tokenText(id))}\ntoken ${id} at ${example.start + place}\nactivation ${value ? number(value, 4) : "0"}`;
  return span;
}

/* ---- one tooltip for everything, by mouse, focus or touch */

let tipped = null;
function showTip(target) {
  tipped = target;
  const tip = byId("tip");
  tip.textContent = target.tip ? target.tip() : target.dataset.tip;
  tip.hidden = false;
  const box = target.getClientRects()[0] ?? target.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 6) + "px";
}
function hideTip() {
  tipped = null;
  byId("tip").hidden = true;
}
function tipTarget(node) {
  return node instanceof Element ? node.closest(".t, [data-tip]") : null;
}
for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => {
    const target = tipTarget(event.target);
    if (target) showTip(target);
    else hideTip();
  });
}
// a word in focus keeps its explanation when the page scrolls to it
addEventListener("scroll", () => {
  if (tipped && tipped === document.activeElement) showTip(tipped);
  else hideTip();
}, { capture: true, passive: true });

/* ---- keys, colours, start */

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else location.hash = "";
    hideTip();
  } else if (typing) {
    return;
  } else if (event.key === "ArrowRight" || event.key === "j") {
    step(1);
  } else if (event.key === "ArrowLeft" || event.key === "k") {
    step(-1);
  } else if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  }
});

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}
const darkness = matchMedia("(prefers-color-scheme: dark)");
darkness.addEventListener("change", () => setTheme(darkness.matches ? "dark" : "light"));
byId("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
setTheme(darkness.matches ? "dark" : "light");

byId("skip").onclick = (event) => {
  event.preventDefault(); // the hash says which feature is shown
  byId("main").focus();
};
byId("search").addEventListener("input", drawList);
byId("sort").addEventListener("change", drawList);
addEventListener("hashchange", route);
drawList();
route();
document.documentElement.dataset.ready = "";
