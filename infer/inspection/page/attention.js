// The part about attention: a grid of heads, one head's triangle, what a token looks at, and the rollout.

const HABITS = {
  previous: "token before",
  first: "first token",
  self: "itself",
  entropy: "entropy",
  induction: "induction",
};

// A square for each head, a row for each layer. paint: (button, layer, head). More columns: `extra`, painted as head N.
// Returns two functions: one draws it anew, one shows which head is chosen.
function headGrid(place, label, paint, extra = false) {
  const { layers, heads } = report.model;
  const columns = heads + (extra ? 1 : 0);
  const grid = el("div", { class: extra ? "heads extra" : "heads", role: "group", "aria-label": label });
  grid.style.setProperty("--columns", heads);
  const press = pressing(grid, () => columns);
  const buttons = [];
  grid.append(el("span"), ...Array.from({ length: heads }, (_, n) => el("span", {}, n)));
  if (extra) grid.append(el("span", {}, "MLP"));
  for (let l = 0; l < layers; l++) {
    grid.append(el("span", {}, l));
    for (let n = 0; n < columns; n++) {
      const pick = () => n < heads && choose({ layer: l, head: n });
      const name = n < heads ? `layer ${l}, head ${n}` : `layer ${l}, MLP`;
      const button = el("button", {
        type: "button",
        title: name,
        "aria-label": name,
        "aria-pressed": "false",
        onclick: pick,
        onfocus: pick,
      });
      buttons.push([button, l, n]);
      grid.append(button);
    }
  }
  place.append(
    el(
      "div",
      { class: "grid-frame" },
      el("p", { class: "axis" }, "heads →"),
      grid,
      el("p", { class: "axis" }, "layers ↓"),
    ),
  );
  const draw = () => {
    for (const each of buttons) paint(...each);
  };
  draw();
  return [draw, () => press(buttons[chosen.layer * columns + chosen.head][0])];
}

// A small picture of a head's triangle, in the colour of the page.
function thumbnail(rows) {
  const T = rows.length;
  const canvas = el("canvas", { width: T, height: T, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--scale");
  rows.forEach((row, t) =>
    row.forEach((weight, k) => {
      context.globalAlpha = Math.sqrt(weight / 1000); // small weights would not be seen
      context.fillRect(k, t, 1, 1);
    }),
  );
  return canvas;
}

function paintHead(button, l, n, look) {
  const name = `layer ${l}, head ${n}`;
  if (look === "pattern") {
    shade(button, 0);
    button.replaceChildren(thumbnail(report.attention.thousandths[l][n]));
    delete button.dataset.path;
    return call(button, name);
  }
  const all = report.heads[look];
  const most = look === "entropy" ? Math.max(...all.flat()) : 1;
  button.replaceChildren();
  shade(button, all[l][n] / (most || 1));
  button.dataset.path = `heads.${look}.${l}.${n}`;
  call(button, `${name}: ${HABITS[look]} ${format(all[l][n], 2)}`);
}

// Keys across, queries down. Cells before the sliding window are hatched, later tokens stay empty.
function triangle(place) {
  const T = report.tokens.length;
  const size = T <= 12 ? 40 : T <= 40 ? 16 : 8;
  const margin = T <= 40 ? 74 : 4; // for words
  const whole = margin + T * size + 2;
  const label = "The weights of this head: each row is a token that looks, each column one that is looked at";
  const frame = { viewBox: `0 0 ${whole} ${whole}`, width: whole };
  const picture = svg("svg", { class: "triangle", role: "img", "aria-label": label, ...frame }, hatching());
  picture.style.minWidth = `${Math.min(whole, 350)}px`; // wider than a narrow page, it scrolls
  const cells = [];
  for (let t = 0; t < T; t++) {
    if (margin > 4) picture.append(...triangleWords(t, margin, margin + (t + 0.5) * size));
    for (let k = 0; k <= t; k++) {
      const [cell, number] = triangleCell(t, k, size, margin, T <= 12);
      picture.append(cell, ...(number ? [number] : []));
      cells.push([cell, number, t, k]);
    }
  }
  const marker = svg("rect", { class: "marker", x: margin - 1, width: T * size + 2, height: size });
  picture.append(marker);
  place.append(picture);
  let shown = null;
  return () => {
    const rows = report.attention.thousandths[chosen.layer][chosen.head];
    marker.setAttribute("y", margin + chosen.token * size - 0.5);
    if (rows !== shown) for (const each of cells) paintCell(rows, ...each);
    shown = rows;
  };
}

function hatching() {
  const size = { width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
  const line = svg("line", { x1: 0, y1: 0, x2: 0, y2: 4, class: "hatch" });
  return svg("defs", {}, svg("pattern", { id: "outside", ...size }, line));
}

function triangleWords(t, margin, middle) {
  const label = visible(report.tokens[t].text).slice(0, 10);
  const turned = `translate(${middle} ${margin - 5}) rotate(-90)`;
  return [
    svg("text", { x: margin - 5, y: middle, class: "row" }, label),
    svg("text", { x: 0, y: 0, class: "column", transform: turned }, label),
  ];
}

function outsideWindow(t, k) {
  return report.model.window !== null && t - k >= report.model.window;
}

function triangleCell(t, k, size, margin, withNumber) {
  const [x, y] = [margin + k * size, margin + t * size];
  const kind = outsideWindow(t, k) ? "cell outside" : "cell";
  const place = { x, y, width: size - 1, height: size - 1 };
  const cell = svg("rect", { class: kind, ...place, onpointerenter: () => choose({ token: t }) }, svg("title"));
  const middle = { x: x + (size - 1) / 2, y: y + size / 2 };
  return [cell, withNumber && !outsideWindow(t, k) ? svg("text", { class: "weight", ...middle }) : null];
}

function paintCell(rows, cell, number, t, k) {
  const weight = rows[t][k] / 1000;
  const words = [t, k].map((i) => visible(report.tokens[i].text));
  const share = Math.sqrt(weight); // small weights would not be seen
  cell.firstChild.textContent = outsideWindow(t, k)
    ? `${words[1]} is outside of the window of ${words[0]}`
    : `${words[0]} looks at ${words[1]}: ${format(weight, 3)}`;
  if (!outsideWindow(t, k)) shade(cell, share);
  if (!number) return;
  number.textContent = weight >= 0.005 ? weight.toFixed(2).replace(/^0/, "") : "";
  number.setAttribute("data-path", `attention.thousandths.${chosen.layer}.${chosen.head}.${t}.${k}`);
  number.setAttribute("data-unit", 1000);
  number.classList.toggle("strong", share > 0.57);
  number.classList.toggle("full", share > 0.72);
}

// "is looks at: The 0.70, France 0.12 ...", the five largest.
function drawLook(place) {
  const path = `attention.thousandths.${chosen.layer}.${chosen.head}.${chosen.token}`;
  const row = at(path);
  const order = row
    .map((_, k) => k)
    .sort((a, b) => row[b] - row[a])
    .slice(0, 5)
    .filter((k) => row[k] > 0);
  place.replaceChildren(
    word(report.tokens[chosen.token].text),
    " looks at ",
    ...order.flatMap((k, i) => [i ? ", " : "", word(report.tokens[k].text), " ", num(`${path}.${k}`, 2, 1000)]),
    ".",
  );
}

function drawHabits(place) {
  const { layer, head } = chosen;
  const known = Object.entries(HABITS).filter(([key]) => report.heads?.[key]);
  const path = (key) => `heads.${key}.${layer}.${head}`;
  const numbers = known.flatMap(([key, name], i) => [i ? " · " : "", `${name} `, num(path(key))]);
  place.replaceChildren(el("h3", {}, `Layer ${layer}, head ${head}`), paragraph("note", ...numbers));
}

// The grid of heads at the left. Returns a function that shows which one is chosen.
function drawHeads(place) {
  const known = Object.entries(HABITS).filter(([key]) => report.heads?.[key]);
  const looks = { pattern: "pattern", ...Object.fromEntries(known) };
  let look = known.length ? known[0][0] : "pattern";
  const [paint, mark] = headGrid(place, "Heads: arrow keys choose one", (button, l, n) =>
    paintHead(button, l, n, look),
  );
  const pick = (key) => {
    look = key;
    paint();
  };
  place.prepend(choices("Colour by", looks, look, pick));
  // Thumbnails are painted in the colour of the page.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  return mark;
}

function drawAttention() {
  const left = el("div", { class: "left" });
  const right = el("div", { class: "right" });
  const habits = el("div");
  const look = sentence();
  const frame = el("div", { class: "scroll" });
  const mark = drawHeads(left);
  right.append(habits);
  const path = (i) => `attention.thousandths.${chosen.layer}.${chosen.head}.${chosen.token}.${i}`;
  const line = tokenLine(right, "What the chosen token looks at", {
    below: (i) => (i <= chosen.token ? num(path(i), 2, 1000) : null),
    share: (i) => (i <= chosen.token ? at(path(i)) / 1000 : 0),
    dim: (i) => i > chosen.token,
    live: true,
  });
  right.append(look, frame);
  const cells = triangle(frame);
  body("attention").append(el("div", { class: "split" }, left, right));
  noteWindow();
  watch(() => {
    mark();
    drawHabits(habits);
    line();
    drawLook(look);
    cells();
  });
  if (report.rollout) drawRollout(body("attention"));
}

function noteWindow() {
  const { window: size } = report.model;
  const say = (text) => (document.getElementById("window-note").textContent = text);
  if (size === null) return say("This model has no sliding window: every token may look at all before it.");
  const start = `This model has a sliding window of ${large(size)} tokens: `;
  if (size >= report.tokens.length) return say(`${start}this text is shorter, so that nothing is hidden by it.`);
  say(`${start}a token sees itself and the ${large(size - 1)} before it. What is farther is hatched in the triangle.`);
}

function drawRollout(place) {
  const most = Math.max(...report.rollout);
  place.append(
    el("h3", {}, "All layers together: attention rollout"),
    el(
      "p",
      { class: "note" },
      "A rough estimate of where the last token’s content comes from: the layers’ mean weights are multiplied, and " +
        "the stream that stays in place counts as half. Where most heads rest on the first token, it gets nearly all.",
    ),
  );
  watch(
    tokenLine(place, "Attention rollout of the last token", {
      below: (i) => num(`rollout.${i}`, 3, 1, true),
      share: (i) => report.rollout[i] / most,
    }),
  );
}
