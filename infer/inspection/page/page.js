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
  let most = -Infinity;
  report.attribution?.heads.forEach((row, layer) =>
    row.forEach((x, head) => {
      if (x === null || x <= most) return;
      most = x;
      Object.assign(chosen, { layer, head });
    }),
  );
}

// One choice changes sentences in all parts: only those of the part that has the focus are read out.
function quietOthers() {
  const live = [...document.querySelectorAll("main [aria-live]")];
  const hush = ({ target }) => {
    const here = target.closest("section");
    for (const each of live) each.setAttribute("aria-live", here.contains(each) ? "polite" : "off");
  };
  document.getElementById("main").addEventListener("focus", hush, true); // before the focus chooses anything
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
  quietOthers();
  const footer = document.querySelector("footer");
  const read = codeLinks(footer);
  if (read) footer.append(read);
  document.documentElement.dataset.drawn = "yes";
}

start();
