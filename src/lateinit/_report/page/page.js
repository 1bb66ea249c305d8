"use strict";
// All texts become text nodes, never markup, since names in a checkpoint may contain anything.
const data = JSON.parse(document.getElementById("data").textContent);
for (const group of data.groups) group.histogram ??= data.histograms[group.members[0]];
const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// -- numbers in words ----------------------------------------------------------------------------

function bytes(count) {
  if (count === null) return "?";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.round(count * 10) < 10000) return unit === "B" ? `${count} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}
const short = (value) => (value === null ? "" : String(Number(value.toPrecision(4))));
const about = (h, key) => (!h || h[key] === null ? "" : (h.exact ? "" : "\u2248 ") + short(h[key]));
const many = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
// plotly interprets some markup in labels.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const settings = { displayModeBar: false, responsive: true };
const layout = (more) => ({
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: color("--sans"), size: 13, color: color("--text") }, ...more,
});

// -- the treemap ---------------------------------------------------------------------------------

let way = Object.keys(data.treemap.ways)[0];

function drawTreemap() {
  const tree = data.treemap, colors = Array.from({ length: 8 }, (_, i) => color(`--c${i}`));
  // A box whose contents are visible at first is only a frame; a box that opens later has a colour.
  const paint = tree.ways[way].colours.map((c, i) => (tree.frames[i] ? color("--panel") : colors[c]));
  Plotly.react("treemap", [{
    type: "treemap", branchvalues: "total", maxdepth: tree.depth, sort: true,
    ids: tree.labels.map((_, i) => `n${i}`),
    labels: tree.labels.map(plain),
    parents: tree.parents.map((p) => (p < 0 ? "" : `n${p}`)),
    values: tree.values, customdata: tree.values.map(bytes),
    texttemplate: "%{label}<br>%{customdata}",
    hovertemplate: "%{currentPath}%{label}<br>%{customdata}, %{percentRoot} of all<extra></extra>",
    marker: { colors: paint, line: { width: 1, color: color("--bg") }, pad: { t: 20, l: 2, r: 2, b: 2 }, cornerradius: 2 },
    tiling: { packing: "squarify", pad: 1 },
    textfont: { color: tree.frames.map((frame) => (frame ? color("--text") : "#ffffff")) },
    pathbar: { visible: true, textfont: { color: color("--text") } },
  }], layout({ margin: { t: 26, l: 0, r: 0, b: 0 }, uniformtext: { minsize: 10, mode: "hide" } }), settings);
  $("legend").replaceChildren(...tree.ways[way].legend.map(([kind, size], i) =>
    element("li", {}, element("b", { style: `background: var(--c${Math.min(i, 7)})` }), kind || "(top level)",
      element("span", {}, bytes(size)))));
}

function chooseWay(name) {
  way = name;
  for (const button of $("ways").children) button.setAttribute("aria-pressed", button.value === way);
  drawTreemap();
}

const wayNames = { module: "module", dtype: "dtype", init: "initialiser", source: "source" };
$("ways").append(...Object.keys(data.treemap.ways).map((name) =>
  element("button", { value: name, "aria-pressed": name === way, onclick: () => chooseWay(name) }, wayNames[name])));

// -- histograms ----------------------------------------------------------------------------------

function spark(h) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 41 16");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const counts = h.counts.length === 1 ? [...Array(20).fill(0), h.counts[0], ...Array(20).fill(0)] : h.counts;
  const top = Math.max(...counts);
  path.setAttribute("d", counts.map((c, i) => `M${i} 16V${16 - (15 * c) / top}h.86V16z`).join(""));
  svg.append(path);
  return svg;
}

const inWords = (h) => (!h ? "not looked at" : h.counts.length === 0 ? h.why
  : h.counts.length === 1 ? `all ${short(h.low)}` : `${short(h.low)} to ${short(h.high)}`);
let shown = null;

function show(subject) {
  shown = subject;
  const { name, histogram: h, line, tensors, seen } = subject;
  $("which").textContent = name;
  const sampled = !h || !h.values ? "" : `${many(h.values, "value")} of ${many(line.numel * tensors, "element")}`
    + (tensors > 1 ? `, from ${seen} of ${many(tensors, "tensor")}` : "");
  const odd = h && h.not_finite ? `${many(h.not_finite, "value")} infinite or NaN` : "";
  $("told").textContent = [line.source === "loaded" ? "from the checkpoint" : line.init, `${line.shape} ${line.dtype}`, sampled, odd].filter(Boolean).join(" \u00b7 ");
  $("moments").textContent = h && h.counts.length
    ? `mean ${about(h, "mean")}, standard deviation ${about(h, "std")}, ${inWords(h)}` : inWords(h);
  for (const card of $("cards").children) card.setAttribute("aria-pressed", card.title === name);
  if (!h || !h.counts.length) { Plotly.purge("histogram"); return; }
  const wide = h.counts.length > 1 ? h.high / h.counts.length - h.low / h.counts.length : Math.abs(h.low) / 20 || 1;
  const start = h.counts.length > 1 ? h.low + wide / 2 : h.low;
  Plotly.react("histogram", [{
    type: "bar", x: h.counts.map((_, i) => start + i * wide), y: h.counts, width: wide * 0.94,
    marker: { color: color("--c0") }, hovertemplate: "%{x:.4g}<br>%{y:,} values<extra></extra>",
  }], layout({
    margin: { t: 14, l: 56, r: 8, b: 34 }, bargap: 0,
    xaxis: { gridcolor: color("--line"), zeroline: false, nticks: 7, ...(h.counts.length === 1 ? { range: [h.low - 10 * wide, h.low + 10 * wide] } : {}) },
    yaxis: { gridcolor: color("--line"), zerolinecolor: color("--line"), rangemode: "tozero", nticks: 5 },
  }), settings);
}

const ofGroup = (g) => ({ name: g.name, histogram: g.histogram, line: data.lines[g.members[0]], tensors: g.members.length, seen: g.seen });
const ofLine = (i) => ({ name: data.lines[i].name, histogram: data.histograms[i], line: data.lines[i], tensors: 1, seen: 1 });
const largest = data.groups.filter((g) => g.histogram.counts.length)
  .map((g) => [g, g.members.reduce((sum, i) => sum + data.lines[i].memory, 0)]).sort((a, b) => b[1] - a[1]).map(([g]) => g);

function drawCards(most) {
  $("cards").replaceChildren(...largest.slice(0, most).map((g) => element("button",
    { title: g.name, "aria-pressed": false, onclick: () => show(ofGroup(g)) },
    element("span", {}, element("bdi", { dir: "ltr" }, g.name)), spark(g.histogram), element("small", {}, inWords(g.histogram)))));
  $("all-cards").hidden = largest.length <= most;
  $("all-cards").textContent = `show all ${largest.length.toLocaleString("en")}`;
  $("all-cards").onclick = () => { drawCards(largest.length); show(shown); };
}

// -- the table -----------------------------------------------------------------------------------

const sum = (members, key) => members.reduce((total, i) => total + (data.lines[i][key] || 0), 0);
const columns = [
  { key: "name", of: (r) => r.name },
  { key: "shape", of: (r) => r.line.numel, text: (r) => r.line.shape },
  { key: "dtype", of: (r) => r.line.dtype },
  { key: "kind", of: (r) => r.line.kind },
  { key: "bytes", number: true, of: (r) => r.bytes, text: (r) => bytes(r.line.nbytes === null ? null : r.bytes) },
  { key: "init", title: "initialised", of: (r) => r.line.init },
  { key: "source", of: (r) => r.line.source },
  { key: "mean", number: true, of: (r) => r.h && r.h.mean, text: (r) => about(r.h, "mean") },
  { key: "std", number: true, of: (r) => r.h && r.h.std, text: (r) => about(r.h, "std") },
  { key: "values" },
].filter(({ key }) => !["kind", "init", "source"].includes(key) || data.lines.some((line) => line[key]));
const state = { sort: null, down: false, words: [], open: new Set(), most: 200 };
const texts = data.lines.map((l) => [l.name, l.notes, l.shape, l.dtype, l.kind, l.init, l.source].join(" ").toLowerCase());

function rows() {
  const found = [];
  data.groups.forEach((g, number) => {
    const all = state.words.every((w) => g.name.toLowerCase().includes(w));
    const members = all ? g.members : g.members.filter((i) => state.words.every((w) => texts[i].includes(w)));
    if (!members.length) return;
    const whole = members.length === g.members.length;
    const one = members.length === 1;
    found.push({
      number, members, group: g, whole, line: data.lines[members[0]], bytes: sum(members, "nbytes"),
      name: one ? data.lines[members[0]].name : g.name,
      h: one ? data.histograms[members[0]] : g.histogram,
    });
  });
  const column = columns.find((c) => c.key === state.sort);
  if (column) {
    const sign = state.down ? -1 : 1;
    found.sort((a, b) => {
      const [x, y] = [column.of(a), column.of(b)];
      if (x === y) return a.number - b.number;
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  return found;
}

function cells(row, subject) {
  return columns.slice(1).map((c) => {
    if (c.key === "values") {
      const h = row.h;
      return element("td", { class: "drawn" }, ...(h && h.counts.length ? [element("button", {
        title: "show the histogram", "aria-label": `histogram of ${row.name}`,
        onclick: () => { show(subject); $("which").scrollIntoView({ block: "center" }); },
      }, spark(h))] : [element("span", { title: inWords(h) }, "\u2013")]));
    }
    return element("td", { class: c.number ? "number" : c.key }, (c.text || c.of)(row) || "");
  });
}

function lineOf(row) {
  const { group: g, members } = row;
  const several = members.length > 1, open = state.open.has(row.number);
  const name = element("td", { class: "name" });
  if (several) name.append(element("button", {
    "aria-expanded": open, "aria-label": `each of ${g.name}`,
    onclick: () => { state.open[open ? "delete" : "add"](row.number); drawTable(); },
  }, open ? "\u25be" : "\u25b8"));
  name.append(row.name);
  if (several) name.append(element("em", {}, row.whole ? ` \u00d7\u00a0${members.length}` : ` ${members.length}\u00a0of\u00a0${g.members.length}`));
  else if (row.line.notes) name.append(element("em", {}, ` ${row.line.notes}`));
  const found = [element("tr", {}, name, ...cells(row, several ? ofGroup(g) : ofLine(members[0])))];
  if (several && open) {
    for (const i of members) {
      const one = { name: data.lines[i].name, line: data.lines[i], bytes: data.lines[i].nbytes, h: data.histograms[i] };
      found.push(element("tr", { class: "member" }, element("td", { class: "name" }, one.name), ...cells(one, ofLine(i))));
    }
  }
  return found;
}

function drawTable() {
  const found = rows();
  $("heads").replaceChildren(...columns.map((c) => {
    const title = c.title || c.key;
    const head = element("th", { scope: "col", class: c.number ? "number" : "" });
    if (state.sort === c.key) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    head.append(c.of ? element("button", { value: c.key, onclick: () => sortBy(c) }, title) : element("button", { disabled: "" }, title));
    return head;
  }));
  $("rows").replaceChildren(...found.slice(0, state.most).flatMap(lineOf));
  const tensors = found.reduce((total, row) => total + row.members.length, 0);
  $("count").textContent = `${tensors.toLocaleString("en")} of ${many(data.lines.length, "tensor")}, `
    + bytes(found.reduce((total, row) => total + sum(row.members, "memory"), 0));
  $("all-rows").hidden = found.length <= state.most;
  $("all-rows").textContent = `show all ${found.length.toLocaleString("en")} lines`;
}

function sortBy(column) {
  // Numbers are sorted from the largest down at first; a third click restores the model's order.
  const first = Boolean(column.number);
  if (state.sort !== column.key) Object.assign(state, { sort: column.key, down: first });
  else if (state.down === first) state.down = !first;
  else state.sort = null;
  drawTable();
}

$("filter").addEventListener("input", () => {
  state.words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  drawTable();
});
$("all-rows").onclick = () => { state.most = Infinity; drawTable(); };

// -- start ---------------------------------------------------------------------------------------

function draw() {
  drawTreemap();
  if (shown) show(shown);
}
drawTable();
drawCards(9);
if (largest.length) shown = ofGroup(largest[0]);
else $("values").hidden = true;
$("memory").hidden = data.treemap.labels.length < 2;
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
