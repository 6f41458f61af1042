// The parts about what comes out: the next word under the sampler's settings, a generated text, and the parameters.

const WORDS = { temperature: "temperature", topK: "top-k", topP: "top-p", minP: "min-p" };

// The places of the sliders. Temperature and the like are hundredths; top-k goes in steps that grow, 0 is off.
function stepsOf(vocabulary) {
  const counts = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 50, 64, 100, 200, 500, 1000, 2000, 5000, 10000];
  const hundredths = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => (first + i) / 100);
  return { temperature: hundredths(0, 300), topK: [0, ...counts.filter((k) => k < vocabulary)], topP: hundredths(1, 100), minP: hundredths(0, 100) };
}

const SOFTMAX = { temperature: 1, topK: 0, topP: 1, minP: 0 }; // all of them off

function defaults() {
  const given = report.next.sampling ?? {};
  return { temperature: given.temperature ?? 0, topK: given.top_k ?? 0, topP: given.top_p ?? 1, minP: given.min_p ?? 0 };
}

function describe(key, value) {
  if (key === "temperature" && value === 0) return "0: greedy";
  if (key === "topK") return value === 0 ? "off" : large(value);
  return value.toFixed(2) + (key !== "temperature" && value === SOFTMAX[key] ? ", off" : "");
}

function slider(key, steps, settings, changed) {
  const nearest = steps.reduce((best, x, i) => (Math.abs(x - settings[key]) < Math.abs(steps[best] - settings[key]) ? i : best), 0);
  const output = el("output", { id: `${key}-value` }, describe(key, settings[key]));
  const input = el("input", { type: "range", id: `${key}-slider`, min: 0, max: steps.length - 1, step: 1, value: nearest, oninput: () => {
    settings[key] = steps[input.value];
    changed();
  } });
  const show = () => {
    output.textContent = describe(key, settings[key]);
    input.setAttribute("aria-valuetext", output.textContent);
    input.value = steps.reduce((best, x, i) => (Math.abs(x - settings[key]) < Math.abs(steps[best] - settings[key]) ? i : best), 0);
  };
  return [el("label", { for: `${key}-slider` }, WORDS[key]), input, output, show];
}

function nextTable(chances) {
  const { top } = report.next, most = Math.max(top[0][2], ...top.map(([id]) => chances[id]));
  const bar = (share, name) => {
    const part = el("span", { class: `bar ${name}` }, el("span"));
    part.firstChild.style.width = `${(100 * share / most).toFixed(2)}%`;
    return part;
  };
  const head = ["token", "logit", "probability", "with the sliders", ""].map((name) => el("th", { scope: "col" }, name));
  return el("table", { class: "next" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...top.map(([id, , probability], i) => {
    const out = chances[id] === 0;
    return el("tr", { class: out ? "out" : null }, el("th", { scope: "row" }, wordOf(id)), el("td", {}, num(`next.top.${i}.1`)),
      el("td", {}, num(`next.top.${i}.2`, 4)), el("td", { class: "live", "data-id": id }, out ? "out" : format(chances[id], 4)),
      el("td", {}, bar(probability, "before"), bar(chances[id], "after")));
  })));
}

function summary(chances, plain) {
  let kept = 0, held = 0, entropy = 0;
  chances.forEach((p, id) => { if (p > 0) { kept++; held += plain[id]; entropy -= p * Math.log(p); } });
  return `${large(kept)} of ${large(chances.length)} tokens can be drawn. Before, they had ${format(held, 3)} of the probability. `
    + `Entropy now: ${format(entropy, 2)} nats.`;
}

function drawNext() {
  const place = body("next"), logits = decodeLogits(report.next.logits), plain = softmax(logits);
  // Greedy would show one bar: a model whose default it is begins with all sliders off.
  const settings = defaults().temperature > 0 ? defaults() : { ...SOFTMAX }, steps = stepsOf(logits.length), drawn = new Map();
  const table = el("div", { class: "scroll" }), note = el("p", { class: "note", id: "summary", "aria-live": "polite" }), result = el("p", { class: "sentence", "aria-live": "polite" });
  let chances;
  const show = () => {
    chances = chancesOf(logits, settings);
    table.replaceChildren(nextTable(chances));
    note.textContent = summary(chances, plain);
    for (const each of sliders) each[3]();
  };
  const changed = () => { drawn.clear(); result.replaceChildren(); show(); };
  const sliders = Object.keys(WORDS).map((key) => slider(key, steps[key], settings, changed));
  const roll = () => {
    const id = draw(chances, Math.random());
    drawn.set(id, (drawn.get(id) ?? 0) + 1);
    const tally = [...drawn].sort((one, other) => other[1] - one[1]).slice(0, 12);
    result.replaceChildren("Drawn: ", wordOf(id), ". So far: ", ...tally.flatMap(([each, count], i) => [i ? ", " : "", wordOf(each), ` ${count}×`]), ".");
  };
  const set = (values) => () => { Object.assign(settings, values); changed(); };
  const presets = el("div", { class: "choices" }, el("button", { type: "button", class: "main", onclick: roll }, "Draw one"),
    el("button", { type: "button", onclick: set(defaults()) }, "This model’s defaults"),
    el("button", { type: "button", onclick: set(SOFTMAX) }, "Plain softmax"),
    el("button", { type: "button", onclick: set({ temperature: 0.8, topK: 40, topP: 0.95, minP: 0.05 }) }, "All four"));
  place.append(el("div", { class: "sliders" }, ...sliders.flatMap((each) => each.slice(0, 3))), presets, note, result, table);
  show();
}

function drawParameters() {
  const place = body("parameters"), { model } = report, { parameters } = model;
  const most = Math.max(...parameters.map((row) => row.count));
  const sizes = { layers: "layers", heads: "query heads", kv_heads: "key-value heads", head_dim: "size of a head", width: "width of the stream",
    ffn: "width of the MLP", vocab: "tokens in the vocabulary" };
  place.append(el("p", { class: "sentence" }, count("model.total"), ` parameters, about ${short(model.total)}, kept as ${model.weights}.`
    + (model.tied ? " The embedding is also the last matrix: it is counted once." : "")),
    el("dl", { class: "detail" }, ...Object.entries(sizes).flatMap(([key, name]) => [el("dt", {}, name), el("dd", {}, count(`model.${key}`))])));
  place.append(el("div", { class: "scroll" }, el("table", { class: "next parts" }, el("thead", {}, el("tr", {}, ...["part", "how many", "parameters", "share", ""].map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...parameters.map((row, i) => {
      const bar = el("span", { class: "bar after" }, el("span"));
      bar.firstChild.style.width = `${(100 * row.count / most).toFixed(2)}%`;
      return el("tr", {}, el("th", { scope: "row" }, row.part), el("td", {}, row.formula.replaceAll(" x ", " × ")), el("td", {}, count(`model.parameters.${i}.count`)),
        el("td", {}, `${format(100 * row.count / model.total, 1)} %`), el("td", {}, bar));
    })))));
}

// One generated text: its steps as buttons, and below them what the chosen step was about.
function timeline(place, key, title) {
  const steps = report.generation[key], detail = el("div", { class: "step", "aria-live": "polite" });
  const line = el("div", { class: "line", role: "group", "aria-label": title });
  const press = pressing(line, () => firstLine(line));
  const show = (i) => {
    press(line.children[i]);
    drawStep(detail, key, i);
  };
  steps.forEach((step, i) => {
    const pick = () => show(i);
    const button = el("button", { type: "button", "aria-pressed": "false", onclick: pick, onfocus: pick, onpointerenter: pick }, wordOf(step.id), el("span", { class: "below" }, num(`generation.${key}.${i}.probability`)));
    shade(button, step.probability);
    line.append(button);
  });
  place.append(el("div", {}, el("h3", {}, title), line, detail));
  if (steps.length) show(0);
}

function drawStep(place, key, i) {
  const path = `generation.${key}.${i}`, { id, probability, runners, looked } = at(path);
  const before = [...report.tokens.map((token) => token.text), ...report.generation[key].slice(0, i).map((step) => textOf(step.id) ?? "")];
  const most = Math.max(...looked);
  place.replaceChildren(el("p", { class: "note" }, `Step ${i}: entropy `, num(`${path}.entropy`), " nats. The token, and its likeliest rivals:"),
    bars([{ word: wordOf(id), number: num(`${path}.probability`, 3), share: probability },
      ...runners.map(([rival, p], j) => ({ word: wordOf(rival), number: num(`${path}.runners.${j}.1`, 3), share: p }))]),
    el("p", { class: "note" }, "Where it looked:"),
    el("p", { class: "looked" }, ...looked.map((weight, k) => {
      const token = word(before[k], { title: `${visible(before[k])} ${format(weight / 1000, 3, true)}`, "data-looked": `${path}.looked.${k}` });
      shade(token, weight / most);
      return token;
    })));
}

function drawGeneration() {
  const place = body("generation"), { generation: g } = report, columns = el("div", { class: "split even" });
  place.append(columns);
  timeline(columns, "greedy", "Greedy: always the likeliest");
  if (g.sampled) timeline(columns, "sampled", `By chance: temperature ${g.temperature}, seed ${g.seed}`);
}
