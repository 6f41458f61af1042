// The parts about what comes out: the next word under the sampler's settings, a generated text, and the parameters.

const WORDS = { temperature: "temperature", topK: "top-k", topP: "top-p", minP: "min-p" };

// The places of the sliders. Temperature and the like are hundredths; top-k goes in steps that grow, 0 is off.
function stepsOf(vocabulary) {
  const counts = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 64, 100, 200, 500, 1000, 2000, 5000, 10000];
  const hundredths = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => (first + i) / 100);
  return {
    temperature: hundredths(0, 300),
    topK: [0, ...counts.filter((k) => k < vocabulary)],
    topP: hundredths(1, 100),
    minP: hundredths(0, 100),
  };
}

const SOFTMAX = { temperature: 1, topK: 0, topP: 1, minP: 0 }; // all of them off

function defaults() {
  const given = report.next.sampling ?? {};
  return {
    temperature: given.temperature ?? 0,
    topK: given.top_k ?? 0,
    topP: given.top_p ?? 1,
    minP: given.min_p ?? 0,
  };
}

function describe(key, value) {
  if (key === "temperature" && value === 0) return "0: greedy";
  if (key === "topK") return value === 0 ? "off" : large(value);
  return value.toFixed(2) + (key !== "temperature" && value === SOFTMAX[key] ? ", off" : "");
}

// Label, slider and output of one setting, and a function that shows what it is now.
function slider(key, steps, settings, changed) {
  const output = el("output", { id: `${key}-value` });
  const change = () => {
    settings[key] = steps[input.value];
    changed();
  };
  const range = { type: "range", id: `${key}-slider`, min: 0, max: steps.length - 1, step: 1 };
  const input = el("input", { ...range, oninput: change });
  const far = (x) => Math.abs(x - settings[key]);
  const show = () => {
    output.textContent = describe(key, settings[key]);
    input.setAttribute("aria-valuetext", output.textContent);
    input.value = steps.reduce((best, x, i) => (far(x) < far(steps[best]) ? i : best), 0);
  };
  return [el("label", { for: `${key}-slider` }, WORDS[key]), input, output, show];
}

function nextTable(chances) {
  const { top } = report.next;
  const most = Math.max(top[0][2], ...top.map(([id]) => chances[id]));
  const rows = top.map(([id, , probability], i) => {
    const out = chances[id] === 0;
    return el(
      "tr",
      { class: out ? "out" : null },
      el("th", { scope: "row" }, wordOf(id)),
      el("td", {}, num(`next.top.${i}.1`)),
      el("td", {}, num(`next.top.${i}.2`, 4)),
      el("td", { class: "live", "data-id": id }, out ? "out" : format(chances[id], 4)),
      el("td", {}, barOf(probability / most, "before"), barOf(chances[id] / most, "after")),
    );
  });
  return table("next", ["token", "logit", "probability", "with the sliders", ""], rows);
}

function summary(chances, plain) {
  let kept = 0;
  let held = 0;
  let entropy = 0;
  chances.forEach((p, id) => {
    if (p > 0) {
      kept++;
      held += plain[id];
      entropy -= p * Math.log(p);
    }
  });
  return (
    `${large(kept)} of ${large(chances.length)} tokens can be drawn. Before, they had ${format(held, 3)} ` +
    `of the probability. Entropy now: ${format(entropy, 2)} nats.`
  );
}

// Counts a draw -> what is said of it, and of those so far. drawn: a Map of id to how often.
function tallyOf(drawn, id) {
  drawn.set(id, (drawn.get(id) ?? 0) + 1);
  const most = [...drawn].sort((one, other) => other[1] - one[1]).slice(0, 12);
  const list = most.flatMap(([each, times], i) => [i ? ", " : "", wordOf(each), ` ${times}×`]);
  return ["Drawn: ", wordOf(id), ". So far: ", ...list, "."];
}

function drawNext() {
  const logits = decodeLogits(report.next.logits);
  const plain = softmax(logits);
  // Greedy would show one bar: a model whose default it is begins with all sliders off.
  const settings = defaults().temperature > 0 ? defaults() : { ...SOFTMAX };
  const steps = stepsOf(logits.length);
  const drawn = new Map();
  const frame = el("div", { class: "scroll" });
  const note = el("p", { class: "note", "aria-live": "polite" });
  const result = sentence();
  let chances;
  const show = () => {
    chances = chancesOf(logits, settings);
    frame.replaceChildren(nextTable(chances));
    note.textContent = summary(chances, plain);
    for (const each of sliders) each[3]();
  };
  const changed = () => {
    drawn.clear();
    result.replaceChildren();
    show();
  };
  const sliders = Object.keys(WORDS).map((key) => slider(key, steps[key], settings, changed));
  const roll = () => result.replaceChildren(...tallyOf(drawn, draw(chances, Math.random())));
  const presets = presetButtons(roll, (values) => {
    Object.assign(settings, values);
    changed();
  });
  const controls = el("div", { class: "sliders" }, ...sliders.flatMap((each) => each.slice(0, 3)));
  body("next").append(controls, presets, note, result, frame);
  show();
}

function presetButtons(roll, set) {
  const button = (name, onclick, kind = null) => el("button", { type: "button", class: kind, onclick }, name);
  return el(
    "div",
    { class: "choices" },
    button("Draw one", roll, "main"),
    button("This model’s defaults", () => set(defaults())),
    button("Plain softmax", () => set(SOFTMAX)),
    button("All four", () => set({ temperature: 0.8, topK: 40, topP: 0.95, minP: 0.05 })),
  );
}

const SIZES = {
  layers: "layers",
  heads: "query heads",
  kv_heads: "key-value heads",
  head_dim: "size of a head",
  width: "width of the stream",
  ffn: "width of the MLP",
  vocab: "tokens in the vocabulary",
  context: "tokens that a text may have",
};

function drawParameters() {
  const { model } = report;
  const most = Math.max(...model.parameters.map((row) => row.count));
  const sizes = Object.entries(SIZES).filter(([key]) => model[key]);
  const rows = model.parameters.map((row, i) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, row.part),
      el("td", {}, row.formula.replaceAll(" x ", " × ")),
      el("td", {}, count(`model.parameters.${i}.count`)),
      el("td", {}, `${format((100 * row.count) / model.total, 1)} %`),
      el("td", {}, barOf(row.count / most)),
    ),
  );
  const tied = model.tied ? " The embedding is also the last matrix: it is counted once." : "";
  const about = ` parameters, about ${short(model.total)}, kept as ${model.weights}.${tied}`;
  body("parameters").append(
    paragraph("sentence", count("model.total"), about),
    el(
      "dl",
      { class: "detail" },
      ...sizes.flatMap(([key, name]) => [el("dt", {}, name), el("dd", {}, count(`model.${key}`))]),
    ),
    el("div", { class: "scroll" }, table("next parts", ["part", "how many", "parameters", "share", ""], rows)),
  );
}

// One generated text: its steps as buttons, and below them what the chosen step was about.
function timeline(place, key, title) {
  const steps = report.generation[key];
  const detail = el("div", { class: "step", "aria-live": "polite" });
  const line = el("div", { class: "line", role: "group", "aria-label": title });
  const press = pressing(line, () => firstLine(line));
  const show = (i) => {
    press(line.children[i]);
    drawStep(detail, key, i);
  };
  steps.forEach((step, i) => {
    const pick = () => show(i);
    const button = el(
      "button",
      { type: "button", "aria-pressed": "false", onclick: pick, onfocus: pick, onpointerenter: pick },
      wordOf(step.id),
      el("span", { class: "below" }, num(`generation.${key}.${i}.probability`)),
    );
    shade(button, step.probability);
    line.append(button);
  });
  const whole = report.generation.texts?.[key]; // in which characters are whole that several tokens share
  const written = whole === undefined ? null : el("p", { class: "written" }, el("bdi", {}, spelled(whole)));
  place.append(el("div", {}, el("h3", {}, title), written, line, detail));
  if (steps.length) show(0);
}

function drawStep(place, key, i) {
  const path = `generation.${key}.${i}`;
  const { id, probability, runners, looked } = at(path);
  const before = [
    ...report.tokens.map((token) => token.text),
    ...report.generation[key].slice(0, i).map((step) => textOf(step.id) ?? ""),
  ];
  const most = Math.max(...looked, 1);
  const tokens = looked.map((weight, k) => {
    const title = `${visible(before[k])} ${format(weight / 1000, 3, true)}`;
    const token = word(before[k], { title, "data-looked": `${path}.looked.${k}` });
    shade(token, weight / most);
    return token;
  });
  const rivals = runners.map(([rival, p], j) => ({
    word: wordOf(rival),
    number: num(`${path}.runners.${j}.1`, 3),
    share: p,
  }));
  place.replaceChildren(
    paragraph("note", `Step ${i}: entropy `, num(`${path}.entropy`), " nats. The token, and its likeliest rivals:"),
    bars([{ word: wordOf(id), number: num(`${path}.probability`, 3), share: probability }, ...rivals]),
    paragraph("note", "Where it looked:"),
    paragraph("looked", ...tokens),
  );
}

function drawGeneration() {
  const place = body("generation");
  const { generation: g } = report;
  const columns = el("div", { class: "split even" });
  place.append(columns);
  timeline(columns, "greedy", "Greedy: always the likeliest");
  if (g.sampled) timeline(columns, "sampled", `By chance: temperature ${g.temperature}, seed ${g.seed}`);
}
