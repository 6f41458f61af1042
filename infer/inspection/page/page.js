// The whole page: which parts there are, in what order they are drawn, and where their code is.

const PARTS = {
  tokens: drawTokens,
  embedding: drawEmbedding,
  attention: drawAttention,
  residual: drawResidual,
  lens: drawLens,
  attribution: drawAttribution,
  surprise: drawSurprise,
  next: drawNext,
  parameters: drawParameters,
  generation: drawGeneration,
  comparison: drawComparison,
};

// The head that said most for the predicted word is shown first.
function chooseFirstHead() {
  const heads = report.attribution?.heads;
  if (!heads) return;
  const most = Math.max(...heads.flat());
  const layer = heads.findIndex((row) => row.includes(most));
  Object.assign(chosen, { layer, head: heads[layer].indexOf(most) });
}

function drawHeadline() {
  const { model, next } = report;
  document.title = `${spelled([...report.prompt].slice(0, 60).join(""))} · ${model.name}`;
  document.getElementById("model-name").textContent =
    `${model.name}, ${short(model.total)} parameters, ${model.weights}`;
  document.getElementById("model-layers").textContent = model.layers;
  const headline = document.getElementById("headline");
  headline.append(el("bdi", {}, spelled(report.prompt)));
  if (next) headline.append(" ", el("span", { class: "answer" }, wordOf(next.top[0][0]), " ", num("next.top.0.2")));
}

// "phi3_jax/model/decoder.py:123", a link where the file is on the machine that made the page.
function codeLinks(place) {
  const keys = place.dataset.code.split(" ").filter((key) => report.code?.[key]);
  if (!keys.length) return null;
  const link = (key) => {
    const { module, line, name } = report.code[key];
    const text = el("code", {}, `${module}:${line}`);
    return el("span", {}, links[key] ? el("a", { href: links[key] }, text) : text, ` ${name}`);
  };
  return el("p", { class: "code" }, "The code: ", ...keys.map(link));
}

function start() {
  chooseFirstHead();
  drawHeadline();
  for (const section of document.querySelectorAll("main section")) {
    if (!report[section.dataset.needs]) {
      section.remove();
      continue;
    }
    const links_ = codeLinks(section);
    if (links_) section.querySelector(".plain").append(links_);
    document
      .getElementById("contents")
      .append(el("li", {}, el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
    PARTS[section.id]();
  }
  const footer = document.querySelector("footer");
  const read = codeLinks(footer);
  if (read) footer.append(read);
  document.documentElement.dataset.drawn = "yes";
}

start();
