// The part about attention: a grid of heads, one head's triangle, what a token looks at, and the rollout.

const HABITS = { previous: "token before", first: "first token", self: "itself", entropy: "entropy", induction: "induction" };

// A square for each head, a row for each layer. paint: (button, layer, head). More columns: `extra`, painted as head N.
// Returns two functions: one draws it anew, one shows which head is chosen.
function headGrid(place, label, paint, extra = false) {
  const { layers, heads } = report.model, columns = heads + (extra ? 1 : 0);
  const grid = el("div", { class: extra ? "heads extra" : "heads", role: "group", "aria-label": label });
  grid.style.setProperty("--columns", heads);
  const press = pressing(grid, () => columns), buttons = [];
  grid.append(el("span"), ...Array.from({ length: heads }, (_, n) => el("span", {}, n)));
  if (extra) grid.append(el("span", {}, "MLP"));
  for (let l = 0; l < layers; l++) {
    grid.append(el("span", {}, l));
    for (let n = 0; n < columns; n++) {
      const pick = () => n < heads && choose({ layer: l, head: n });
      const name = n < heads ? `layer ${l}, head ${n}` : `layer ${l}, MLP`;
      const button = el("button", { type: "button", title: name, "aria-label": name, "aria-pressed": "false", onclick: pick, onfocus: pick });
      buttons.push([button, l, n]);
      grid.append(button);
    }
  }
  place.append(el("div", { class: "grid-frame" }, el("p", { class: "axis" }, "heads →"), grid, el("p", { class: "axis" }, "layers ↓")));
  const draw = () => { for (const each of buttons) paint(...each); };
  draw();
  return [draw, () => press(buttons[chosen.layer * columns + chosen.head][0])];
}

// A small picture of a head's triangle, in the colour of the page.
function thumbnail(rows) {
  const T = rows.length, canvas = el("canvas", { width: T, height: T, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--scale");
  rows.forEach((row, t) => row.forEach((weight, k) => {
    context.globalAlpha = Math.sqrt(weight / 1000); // small weights would not be seen
    context.fillRect(k, t, 1, 1);
  }));
  return canvas;
}

function paintHead(button, l, n, look) {
  if (look === "pattern") {
    shade(button, 0);
    button.replaceChildren(thumbnail(report.attention.thousandths[l][n]));
  } else {
    const all = report.heads[look], most = look === "entropy" ? Math.max(...all.flat()) : 1;
    button.replaceChildren();
    shade(button, all[l][n] / most);
    const text = `layer ${l}, head ${n}: ${HABITS[look]} ${format(all[l][n], 2)}`;
    button.title = text;
    button.setAttribute("aria-label", text);
    button.dataset.path = `heads.${look}.${l}.${n}`;
  }
}

// Keys across, queries down. Cells before the sliding window are crossed out, later tokens stay empty.
function triangle(place) {
  const T = report.tokens.length, size = T <= 12 ? 40 : T <= 40 ? 16 : 8, margin = T <= 40 ? 74 : 4;
  const window_ = report.model.window ?? T, cells = [];
  const whole = margin + T * size + 2; // wider than a narrow page: it scrolls rather than become too small
  const picture = svg("svg", { class: "triangle", viewBox: `0 0 ${whole} ${whole}`, role: "img", width: whole,
    "aria-label": "The weights of this head: each row is a token that looks, each column one that is looked at" });
  const marker = svg("rect", { class: "marker", x: margin - 1, width: T * size + 2, height: size });
  picture.append(svg("defs", {}, svg("pattern", { id: "outside", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("line", { x1: 0, y1: 0, x2: 0, y2: 4, class: "hatch" }))));
  for (let t = 0; t < T; t++) {
    const label = visible(report.tokens[t].text).slice(0, 10), middle = margin + (t + 0.5) * size;
    if (margin > 4) {
      picture.append(svg("text", { x: margin - 5, y: middle, class: "row" }, label));
      picture.append(svg("text", { x: 0, y: 0, class: "column", transform: `translate(${middle} ${margin - 5}) rotate(-90)` }, label));
    }
    for (let k = 0; k <= t; k++) {
      const outside = t - k >= window_;
      const cell = svg("rect", { x: margin + k * size, y: margin + t * size, width: size - 1, height: size - 1,
        class: outside ? "cell outside" : "cell", onpointerenter: () => choose({ token: t }) }, svg("title"));
      picture.append(cell);
      const number = T <= 12 && !outside ? svg("text", { x: margin + (k + 0.5) * size - 0.5, y: middle, class: "weight" }) : null;
      if (number) picture.append(number);
      if (!outside) cells.push([cell, number, t, k]);
    }
  }
  picture.append(marker);
  picture.style.minWidth = `${Math.min(whole, 350)}px`;
  place.append(picture);
  let shown = null;
  return () => {
    const rows = report.attention.thousandths[chosen.layer][chosen.head];
    marker.setAttribute("y", margin + chosen.token * size - 0.5);
    if (rows === shown) return;
    shown = rows;
    for (const [cell, number, t, k] of cells) {
      const weight = rows[t][k] / 1000, words = [t, k].map((i) => visible(report.tokens[i].text));
      shade(cell, Math.sqrt(weight));
      cell.firstChild.textContent = `${words[0]} looks at ${words[1]}: ${format(weight, 3)}`;
      if (number) {
        number.textContent = weight >= 0.005 ? weight.toFixed(2).replace(/^0/, "") : "";
        number.setAttribute("data-path", `attention.thousandths.${chosen.layer}.${chosen.head}.${t}.${k}`);
        number.setAttribute("data-unit", 1000);
        number.classList.toggle("strong", Math.sqrt(weight) > 0.57);
        number.classList.toggle("full", Math.sqrt(weight) > 0.72);
      }
    }
  };
}

// "is looks at: The 0.70, France 0.12 ...", the five largest.
function drawLook(place) {
  const path = `attention.thousandths.${chosen.layer}.${chosen.head}.${chosen.token}`, row = at(path);
  const order = row.map((_, k) => k).sort((a, b) => row[b] - row[a]).slice(0, 5).filter((k) => row[k] > 0);
  place.replaceChildren(word(report.tokens[chosen.token].text), " looks at ",
    ...order.flatMap((k, i) => [i ? ", " : "", word(report.tokens[k].text), " ", num(`${path}.${k}`, 2, 1000)]), ".");
}

function drawHabits(place) {
  const { layer, head } = chosen;
  place.replaceChildren(el("h3", {}, `Layer ${layer}, head ${head}`));
  if (report.heads) {
    place.append(el("p", { class: "note" }, ...Object.entries(HABITS).filter(([key]) => report.heads[key]).flatMap(([key, name], i) => [
      i ? " · " : "", `${name} `, num(`heads.${key}.${layer}.${head}`)])));
  }
}

function drawAttention() {
  const place = body("attention"), left = el("div", { class: "left" }), right = el("div", { class: "right" });
  const known = Object.entries(HABITS).filter(([key]) => report.heads && report.heads[key]);
  const looks = { pattern: "pattern", ...Object.fromEntries(known) };
  let look = known.length ? known[0][0] : "pattern";
  const [paint, mark] = headGrid(left, "Heads: arrow keys choose one", (button, l, n) => paintHead(button, l, n, look));
  left.prepend(choices("Colour by", looks, look, (key) => { look = key; paint(); }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint); // thumbnails are painted in the colour of the page
  const habits = el("div"), sentence = el("p", { class: "sentence", "aria-live": "polite" });
  right.append(habits);
  const row = () => report.attention.thousandths[chosen.layer][chosen.head][chosen.token];
  const line = tokenLine(right, "What the chosen token looks at", {
    below: (i) => (i <= chosen.token ? num(`attention.thousandths.${chosen.layer}.${chosen.head}.${chosen.token}.${i}`, 2, 1000) : null),
    share: (i) => (i <= chosen.token ? row()[i] / 1000 : 0),
    dim: (i) => i > chosen.token,
    live: true,
  });
  right.append(sentence);
  const frame = el("div", { class: "scroll" });
  right.append(frame);
  const cells = triangle(frame);
  place.append(el("div", { class: "split" }, left, right));
  noteWindow();
  watch(() => { mark(); drawHabits(habits); line(); drawLook(sentence); cells(); });
  if (report.rollout) drawRollout(place);
}

function noteWindow() {
  const { window: size } = report.model, T = report.tokens.length;
  const note = size === null ? "This model has no sliding window: every token may look at all before it."
    : size < T ? `This model has a sliding window: a token sees itself and the ${size - 1} before it. What is farther is hatched in the triangle.`
      : `This model has a sliding window of ${large(size)} tokens; this text is shorter, so that nothing is hidden by it.`;
  document.getElementById("window-note").textContent = note;
}

function drawRollout(place) {
  const most = Math.max(...report.rollout);
  place.append(el("h3", {}, "All layers together: where the last token’s content comes from"),
    el("p", { class: "note" }, "Rollout multiplies the layers’ mean weights, and counts the stream that stays in place as half."));
  watch(tokenLine(place, "Attention rollout of the last token", {
    below: (i) => num(`rollout.${i}`, 3, 1, true), share: (i) => report.rollout[i] / most }));
}
