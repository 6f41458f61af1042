// The parts that go through the layers: the residual stream, the logit lens, attribution, comparison.

const SERIES = { post: "the stream after the layer", attention: "what attention adds", mlp: "what the MLP adds" };

function drawResidual() {
  const place = body("residual");
  const picture = el("div", { class: "chart" });
  const ends = sentence();
  const line = tokenLine(place, "Choose a token", {
    below: (i) => num(`residual.post.${report.model.layers - 1}.${i}`, 1),
  });
  const keys = Object.entries(SERIES).map(([key, name]) => el("span", { class: `key ${key}` }, name));
  place.append(
    el("p", { class: "note" }, "Below each token: the norm of its stream after the last layer."),
    ends,
    el("p", { class: "keys" }, ...keys),
    picture,
  );
  let width = picture.clientWidth; // drawn anew for another width, so that letters keep their size
  const draw = () => {
    const t = chosen.token;
    const last = report.model.layers - 1;
    line();
    ends.replaceChildren(
      "The stream of ",
      word(report.tokens[t].text),
      " begins with a norm of ",
      num(`residual.embed.${t}`),
      " and ends with ",
      num(`residual.post.${last}.${t}`),
      `. In layer ${chosen.layer} attention adds `,
      num(`residual.attention.${chosen.layer}.${t}`),
      ", and the MLP ",
      num(`residual.mlp.${chosen.layer}.${t}`),
      ".",
    );
    picture.replaceChildren(residualChart(width || 640, t));
  };
  watch(draw);
  onWidth(picture, (now) => {
    width = now;
    draw();
  });
}

function residualChart(width, t) {
  const L = report.model.layers;
  const height = 260;
  const [left, right, top, bottom] = [44, 12, 10, 34];
  const rows = Object.keys(SERIES).flatMap((key) => report.residual[key].map((row) => row[t]));
  const powers = [report.residual.embed[t], ...rows].filter((v) => v > 0).map(Math.log10);
  const low = Math.floor(Math.min(...powers));
  const high = Math.max(Math.ceil(Math.max(...powers)), low + 1);
  const x = (l) => left + ((l + 1) / L) * (width - left - right);
  const y = (v) => top + ((high - Math.max(Math.log10(v), low)) / (high - low)) * (height - top - bottom);
  const label = "Norms by layer, on a logarithmic axis";
  const frame = { width, height, viewBox: `0 0 ${width} ${height}` };
  const picture = svg("svg", { role: "img", "aria-label": label, ...frame });
  for (let power = low; power <= high; power++) {
    const level = y(10 ** power);
    picture.append(
      svg("line", { class: "rule", x1: left, x2: width - right, y1: level, y2: level }),
      svg("text", { x: left - 6, y: level, class: "row" }, power < 0 ? String(10 ** power) : large(10 ** power)),
    );
  }
  const tick = (where, text, line = 18) => svg("text", { class: "tick", x: where, y: height - line }, text);
  picture.append(tick(x(-1), "embed"), tick((left + width) / 2, "layer", 4));
  const step = Math.ceil(L / (width / 34));
  for (let l = x(0) - x(-1) > 34 ? 0 : step; l < L; l += step) picture.append(tick(x(l), l));
  for (const key of ["mlp", "attention", "post"]) picture.append(...seriesOf(key, t, x, y));
  return picture;
}

// A line through the layers, and a dot with a title for each number.
function seriesOf(key, t, x, y) {
  const points = report.residual[key].map((row, l) => [x(l), y(row[t]), `residual.${key}.${l}.${t}`, `layer ${l}`]);
  if (key === "post") points.unshift([x(-1), y(report.residual.embed[t]), `residual.embed.${t}`, "embedding"]);
  const places = points.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
  const dots = points.map(([cx, cy, path, name]) =>
    svg(
      "circle",
      { class: `dot ${key}`, cx: cx.toFixed(1), cy: cy.toFixed(1), r: 3, "data-path": path },
      svg("title", {}, `${name}, ${SERIES[key]}: ${format(at(path), 2)}`),
    ),
  );
  return [svg("polyline", { class: `series ${key}`, points: places }), ...dots];
}

// A table with a row for each layer and a column for each token; cell: (button, row, column) paints one.
function layerTable(place, label, rows, cell, detail) {
  const table = el("table", { class: "layers", "aria-label": label });
  const heads = report.tokens.map((token) => el("th", { scope: "col" }, word(token.text)));
  table.append(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), ...heads)));
  const lines = rows.map((row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, row.name),
      ...report.tokens.map((_, t) => {
        const show = () => {
          choose({ token: t });
          detail(row, t);
        };
        const button = el("button", {
          type: "button",
          tabindex: -1,
          onclick: show,
          onfocus: show,
          onpointerenter: () => detail(row, t),
        });
        cell(button, row, t);
        return el("td", {}, button);
      }),
    ),
  );
  table.append(el("tbody", {}, ...lines));
  roving(table, () => report.tokens.length)(table.querySelector("button"));
  place.replaceChildren(table);
  const mark = () =>
    [...place.querySelectorAll("thead th")].forEach((head, i) => head.classList.toggle("here", i - 1 === chosen.token));
  mark();
  if (!place.dataset.watched) watchers.push(mark); // another table may come into the same place
  place.dataset.watched = "yes";
}

function drawLens() {
  const place = body("lens");
  const frame = el("div", { class: "scroll" });
  const detail = sentence();
  const L = report.model.layers;
  const rows = Array.from({ length: L }, (_, l) => [
    { kind: "mid", l, name: `${l} attention` },
    { kind: "post", l, name: `${l}` },
  ]).flat();
  const show = ({ kind, l }, t) => {
    const path = `lens.${kind}.${l}.${t}`;
    detail.replaceChildren(
      `Layer ${l}, after ${kind === "mid" ? "attention" : "the MLP"}, would continue `,
      word(report.tokens[t].text),
      " with ",
      ...at(path).flatMap(([id], i) => [i ? ", " : "", wordOf(id), " ", num(`${path}.${i}.1`, 3)]),
      ".",
    );
  };
  const cell = (button, { kind, l }, t) => {
    const [id, probability] = report.lens[kind][l][t][0];
    button.append(wordOf(id));
    button.dataset.lens = `${kind}.${l}.${t}`;
    shade(button, probability);
  };
  // What follows the last token is what one wants first.
  const toEnd = () => (frame.scrollLeft = frame.scrollWidth);
  const draw = (key) => {
    const wanted = rows.filter(({ kind }) => key === "both" || kind === "post");
    layerTable(frame, "What each layer would say", wanted, cell, show);
    toEnd();
  };
  place.append(
    choices("Read", { post: "after each layer", both: "after attention, too" }, "post", draw),
    detail,
    frame,
  );
  draw("post");
  onWidth(frame, toEnd);
  show(rows.at(-1), report.tokens.length - 1);
}

// One square of the grid: a head's, or behind the last head the MLP's.
function paintShare(button, l, n, most) {
  const isHead = n < report.model.heads;
  const path = isHead ? `attribution.heads.${l}.${n}` : `attribution.mlps.${l}`;
  const text = `layer ${l}, ${isHead ? `head ${n}` : "MLP"}: ${format(at(path), 2)}`;
  call(button, text);
  button.dataset.path = path;
  shade(button, at(path) / most);
}

function attributionSum() {
  const { attribution: a } = report;
  const sum = (list) =>
    format(
      list.reduce((total, x) => total + x, 0),
      2,
    );
  const others = Math.abs(a.rest ?? 0) >= 0.005 ? [", ", num("attribution.rest"), " that belongs to none of them"] : [];
  return paragraph(
    "sentence",
    wordOf(a.id),
    " has a logit of ",
    num("attribution.logit"),
    ": ",
    num("attribution.embed"),
    ` from the embedding, ${sum(a.heads.flat())} from all heads, ${sum(a.mlps)} from all MLPs`,
    ...others,
    ".",
  );
}

function drawAttribution() {
  const { attribution: a } = report;
  const parts = a.mlps.map((x, l) => [x, `layer ${l}, MLP`, `attribution.mlps.${l}`]);
  a.heads.forEach((row, l) =>
    row.forEach((x, n) => parts.push([x, `layer ${l}, head ${n}`, `attribution.heads.${l}.${n}`])),
  );
  parts.sort((one, other) => other[0] - one[0]);
  const most = Math.max(...parts.map(([x]) => Math.abs(x)));
  const left = el("div", { class: "left" });
  const label = "What each head and MLP added to the logit";
  const [, mark] = headGrid(left, label, (button, l, n) => paintShare(button, l, n, most), true);
  watch(mark);
  const list = (rows) =>
    bars(rows.map(([x, name, path]) => ({ word: el("span", {}, name), number: num(path), share: x / most })));
  const lowest = parts.slice(-6).reverse();
  const right = el(
    "div",
    { class: "right" },
    el("h3", {}, "For it"),
    list(parts.slice(0, 8).filter(([x]) => x > 0)),
    el("h3", {}, "Against it"),
    list(lowest.filter(([x]) => x < 0)),
  );
  body("attribution").append(attributionSum(), el("div", { class: "split" }, left, right));
}

function drawComparison() {
  const place = body("comparison");
  const { comparison: c } = report;
  const most = Math.max(...c.kl, 1e-9);
  place.append(
    el("h3", {}, "The other model: ", el("bdi", {}, c.name)),
    el("p", { class: "note" }, "KL divergence of the final guess after each token"),
  );
  watch(
    tokenLine(place, "KL divergence of the final guess after each token", {
      below: (i) => num(`comparison.kl.${i}`, 3, 1, true),
      share: (i) => c.kl[i] / most,
    }),
  );
  if (c.note) place.append(el("p", { class: "sentence" }, c.note));
  if (c.layers.length) drawLayersApart(place, c);
  const list = (title, path, step) =>
    el(
      "div",
      {},
      el("h3", {}, title),
      bars(
        at(path)
          .slice(0, 5)
          .map((row, i) => ({ word: wordOf(row[0]), number: num(`${path}.${i}.${step}`, 3), share: row[step] })),
      ),
    );
  place.append(
    el(
      "div",
      { class: "split even" },
      report.next ? list("What this model says next", "next.top", 2) : null,
      list("What the other says next", "comparison.top", 1),
    ),
  );
}

function drawLayersApart(place, c) {
  const frame = el("div", { class: "scroll" });
  const detail = sentence();
  if (Number.isInteger(c.parted)) {
    const first = num("comparison.parted", 0);
    const rest = ": there their mean cosine falls below 0.99 first.";
    place.append(paragraph("sentence", "The streams part after layer ", first, rest));
  }
  const rows = c.layers.map((_, l) => ({ l, name: String(l) }));
  const show = ({ l }, t) =>
    detail.replaceChildren(
      `Layer ${l}, after `,
      word(report.tokens[t].text),
      ": KL ",
      num(`comparison.layers.${l}.kl.${t}`, 3),
      ", cosine of the streams ",
      num(`comparison.layers.${l}.cosine.${t}`, 4),
      ".",
    );
  const draw = (key) => {
    const far = (x) => (key === "kl" ? x : 1 - x);
    const most = Math.max(...c.layers.flatMap((layer) => layer[key].map(far)), 1e-9);
    const cell = (button, { l }, t) => {
      button.append(num(`comparison.layers.${l}.${key}.${t}`, 3, 1, true));
      shade(button, far(c.layers[l][key][t]) / most);
    };
    layerTable(frame, "Where the models part", rows, cell, show);
  };
  place.append(choices("Compare", { kl: "guesses (KL)", cosine: "streams (cosine)" }, "kl", draw), detail, frame);
  draw("kl");
  show(rows.at(-1), report.tokens.length - 1);
}
