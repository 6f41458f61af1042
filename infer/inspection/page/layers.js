// The parts that go through the layers: the residual stream, the logit lens, attribution, comparison.

const SERIES = { post: "the stream after the layer", attention: "what attention adds", mlp: "what the MLP adds" };

function drawResidual() {
  const place = body("residual"), picture = el("div", { class: "chart" }), sentence = el("p", { class: "sentence", "aria-live": "polite" });
  const line = tokenLine(place, "Choose a token", { below: (i) => num(`residual.post.${report.model.layers - 1}.${i}`, 1) });
  const keys = Object.entries(SERIES).map(([key, name]) => el("span", { class: `key ${key}` }, name));
  place.append(el("p", { class: "note" }, "Below each token: the norm of its stream after the last layer."), sentence,
    el("p", { class: "keys" }, ...keys), picture);
  let width = picture.clientWidth; // drawn anew for another width, so that letters keep their size
  const draw = () => {
    const t = chosen.token, last = report.model.layers - 1;
    line();
    sentence.replaceChildren("The stream of ", word(report.tokens[t].text), " begins with a norm of ",
      num(`residual.embed.${t}`), " and ends with ", num(`residual.post.${last}.${t}`), ".");
    picture.replaceChildren(residualChart(width || 640, t));
  };
  watch(draw);
  new ResizeObserver(() => {
    if (picture.clientWidth === width) return;
    width = picture.clientWidth;
    requestAnimationFrame(draw);
  }).observe(picture);
}

function residualChart(width, t) {
  const L = report.model.layers, height = 260, [left, right, top, bottom] = [44, 12, 10, 34];
  const values = [report.residual.embed[t], ...Object.keys(SERIES).flatMap((key) => report.residual[key].map((row) => row[t]))];
  const positive = values.filter((x) => x > 0);
  const low = Math.floor(Math.log10(Math.min(...positive))), high = Math.max(Math.ceil(Math.log10(Math.max(...positive))), low + 1);
  const x = (l) => left + (l + 1) / L * (width - left - right);
  const y = (v) => top + (high - Math.max(Math.log10(v), low)) / (high - low) * (height - top - bottom);
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Norms by layer, on a logarithmic axis" });
  for (let power = low; power <= high; power++) {
    picture.append(svg("line", { class: "rule", x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }),
      svg("text", { x: left - 6, y: y(10 ** power), class: "row" }, large(10 ** power)));
  }
  const step = Math.ceil(L / (width / 34));
  picture.append(svg("text", { x: x(-1), y: height - 18, class: "tick" }, "embed"));
  for (let l = 0; l < L; l += step) if (l || width > 700) picture.append(svg("text", { x: x(l), y: height - 18, class: "tick" }, l));
  picture.append(svg("text", { x: (left + width) / 2, y: height - 4, class: "tick" }, "layer"));
  for (const key of ["mlp", "attention", "post"]) {
    const points = report.residual[key].map((row, l) => [x(l), y(row[t]), `residual.${key}.${l}.${t}`, `layer ${l}, ${SERIES[key]}`]);
    if (key === "post") points.unshift([x(-1), y(report.residual.embed[t]), `residual.embed.${t}`, "embedding"]);
    picture.append(svg("polyline", { class: `series ${key}`, points: points.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ") }));
    for (const [cx, cy, path, name] of points) {
      picture.append(svg("circle", { class: `dot ${key}`, cx: cx.toFixed(1), cy: cy.toFixed(1), r: 3, "data-path": path },
        svg("title", {}, `${name}: ${format(at(path), 2)}`)));
    }
  }
  return picture;
}

// A table with a row for each layer and a column for each token; cell: (button, row, column) paints one.
function layerTable(place, label, rows, cell, detail) {
  const table = el("table", { class: "layers", "aria-label": label });
  const heads = report.tokens.map((token) => el("th", { scope: "col" }, word(token.text)));
  table.append(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), ...heads)));
  const lines = rows.map((row) => el("tr", { class: row.class ?? null }, el("th", { scope: "row" }, row.name), ...report.tokens.map((_, t) => {
    const show = () => { choose({ token: t }); detail(row, t); };
    const button = el("button", { type: "button", tabindex: -1, onclick: show, onfocus: show, onpointerenter: () => detail(row, t) });
    cell(button, row, t);
    return el("td", {}, button);
  })));
  table.append(el("tbody", {}, ...lines));
  roving(table, () => report.tokens.length)(table.querySelector("button"));
  place.replaceChildren(table);
  const mark = () => [...place.querySelectorAll("thead th")].forEach((head, i) => head.classList.toggle("here", i - 1 === chosen.token));
  mark();
  if (!place.dataset.watched) watchers.push(mark); // another table may come into the same place
  place.dataset.watched = "yes";
}

function drawLens() {
  const place = body("lens"), frame = el("div", { class: "scroll" }), detail = el("p", { class: "sentence", "aria-live": "polite" });
  const L = report.model.layers;
  const rows = Array.from({ length: L }, (_, l) => [{ kind: "mid", l, name: `${l} attention`, class: "mid" }, { kind: "post", l, name: `${l}` }]).flat();
  const show = ({ kind, l }, t) => {
    const path = `lens.${kind}.${l}.${t}`;
    detail.replaceChildren(`Layer ${l}, after ${kind === "mid" ? "attention" : "the MLP"}, would continue `, word(report.tokens[t].text), " with ",
      ...at(path).flatMap(([id], i) => [i ? ", " : "", wordOf(id), " ", num(`${path}.${i}.1`, 3)]), ".");
  };
  const cell = (button, { kind, l }, t) => {
    const [id, probability] = report.lens[kind][l][t][0];
    button.append(wordOf(id));
    button.dataset.lens = `${kind}.${l}.${t}`;
    shade(button, probability);
  };
  layerTable(frame, "What each layer would say", rows, cell, show);
  frame.classList.add("only-post");
  place.append(choices("Read", { post: "after each layer", both: "after attention, too" }, "post",
    (key) => frame.classList.toggle("only-post", key === "post")), detail, frame);
  requestAnimationFrame(() => { frame.scrollLeft = frame.scrollWidth; }); // what follows the last token is what one wants first
  show(rows.at(-1), report.tokens.length - 1);
}

function drawAttribution() {
  const place = body("attribution"), { attribution: a, model } = report;
  const most = Math.max(...a.heads.flat().map(Math.abs), ...a.mlps.map(Math.abs));
  const sum = (list) => list.reduce((total, x) => total + x, 0);
  place.append(el("p", { class: "sentence" }, wordOf(a.id), " has a logit of ", num("attribution.logit"), ": ",
    num("attribution.embed"), ` from the embedding, ${format(sum(a.heads.flat()), 2)} from all heads, ${format(sum(a.mlps), 2)} from all MLPs`,
    ...(Math.abs(a.rest ?? 0) >= 0.005 ? [", ", num("attribution.rest"), " that belongs to none of them."] : ["."])));
  const left = el("div", { class: "left" }), right = el("div", { class: "right" });
  const [, mark] = headGrid(left, "What each head and MLP added to the logit", (button, l, n) => {
    const path = n < model.heads ? `attribution.heads.${l}.${n}` : `attribution.mlps.${l}`;
    const text = `layer ${l}, ${n < model.heads ? `head ${n}` : "MLP"}: ${format(at(path), 2)}`;
    button.title = text;
    button.setAttribute("aria-label", text);
    button.dataset.path = path;
    shade(button, at(path) / most);
  }, true);
  watch(mark);
  const parts = a.mlps.map((x, l) => [x, `layer ${l}, MLP`, `attribution.mlps.${l}`]);
  a.heads.forEach((row, l) => row.forEach((x, n) => parts.push([x, `layer ${l}, head ${n}`, `attribution.heads.${l}.${n}`])));
  parts.sort((one, other) => other[0] - one[0]);
  const list = (rows) => bars(rows.map(([x, name, path]) => ({ word: el("span", {}, name), number: num(path), share: x / most })));
  right.append(el("h3", {}, "For it"), list(parts.slice(0, 8).filter(([x]) => x > 0)),
    el("h3", {}, "Against it"), list(parts.slice(-6).reverse().filter(([x]) => x < 0)));
  place.append(el("div", { class: "split" }, left, right));
}

function drawComparison() {
  const place = body("comparison"), { comparison: c } = report, most = Math.max(...c.kl, 1e-9);
  place.append(el("h3", {}, "The other model: ", el("bdi", {}, c.name)), el("p", { class: "note" }, "KL divergence of the final guess after each token"));
  watch(tokenLine(place, "KL divergence of the final guess after each token", { below: (i) => num(`comparison.kl.${i}`, 3, 1, true), share: (i) => c.kl[i] / most }));
  if (c.note) place.append(el("p", { class: "sentence" }, c.note));
  if (c.layers.length) drawLayersApart(place, c);
  const list = (title, path, step) => el("div", {}, el("h3", {}, title), bars(at(path).slice(0, 5).map((row, i) => (
    { word: wordOf(row[0]), number: num(`${path}.${i}.${step}`, 3), share: row[step] }))));
  place.append(el("div", { class: "split even" }, report.next ? list("What this model says next", "next.top", 2) : null,
    list("What the other says next", "comparison.top", 1)));
}

function drawLayersApart(place, c) {
  const frame = el("div", { class: "scroll" }), detail = el("p", { class: "sentence", "aria-live": "polite" });
  if (c.parted !== null && c.parted !== undefined) {
    place.append(el("p", { class: "sentence" }, "The streams part after layer ", num("comparison.parted", 0), ": there their mean cosine falls below 0.99 first."));
  }
  const rows = c.layers.map((_, l) => ({ l, name: String(l) }));
  const show = ({ l }, t) => detail.replaceChildren(`Layer ${l}, after `, word(report.tokens[t].text), ": KL ", num(`comparison.layers.${l}.kl.${t}`, 3),
    ", cosine of the streams ", num(`comparison.layers.${l}.cosine.${t}`, 4), ".");
  const draw = (key) => {
    const far = (x) => (key === "kl" ? x : 1 - x);
    const largest_ = Math.max(...c.layers.flatMap((layer) => layer[key].map(far)), 1e-9);
    layerTable(frame, "Where the models part", rows, (button, { l }, t) => {
      button.append(num(`comparison.layers.${l}.${key}.${t}`, 3, 1, true));
      shade(button, far(c.layers[l][key][t]) / largest_);
    }, show);
  };
  place.append(choices("Compare", { kl: "guesses (KL)", cosine: "streams (cosine)" }, "kl", draw), detail, frame);
  draw("kl");
  show(rows.at(-1), report.tokens.length - 1);
}
