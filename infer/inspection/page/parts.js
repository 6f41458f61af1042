// What all parts are made of: elements, numbers that know where in the report they stand, tokens, grids of keys.

// What goes wrong is said on the page: nobody looks at a console.
function tell(message) {
  document.getElementById("problems").append(el("span", { class: "problem" }, message));
}

addEventListener("error", (event) => tell(`Error: ${event.message} (line ${event.lineno})`));
addEventListener("unhandledrejection", (event) => tell(`Error: ${event.reason}`));
addEventListener("securitypolicyviolation", (event) => tell(`Refused: ${event.violatedDirective} ${event.blockedURI}`));

const report = JSON.parse(document.getElementById("report").textContent);
const links = JSON.parse(document.getElementById("links").textContent);

// An element; attributes are strings, or functions for events ("onclick"). Texts are only ever text: nothing is parsed.
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Numbers.

function at(path) {
  return path.split(".").reduce((value, key) => value[key], report);
}

// Fixed digits; small numbers keep two that count, unless all of them are `fixed`. A real minus sign.
function format(x, digits, fixed = false) {
  if (x === null || x === undefined) return "–";
  const small = !fixed && x !== 0 && Math.abs(x) < 10 ** -digits;
  return (small ? x.toPrecision(2) : x.toFixed(digits)).replace("-", "−");
}

// A number of the report: tests compare its text with what the report has at the path, divided by `unit`.
function num(path, digits = 2, unit = 1, fixed = unit !== 1) {
  const value = at(path);
  const attributes = { class: "num", "data-path": path };
  if (unit !== 1) attributes["data-unit"] = unit;
  return el("span", attributes, format(value === null ? null : value / unit, digits, fixed));
}

// A whole number of the report, with a comma after each three digits.
function count(path) {
  return el("span", { class: "num", "data-path": path }, large(at(path)));
}

function large(x) {
  return x.toLocaleString("en-US");
}

function short(x) {
  for (const [size, name] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (x >= size) return (x / size).toPrecision(3) + name;
  return String(x);
}

// Tokens.

function textOf(id) {
  return report.vocabulary[id] ?? null;
}

// A token's text in which nothing is invisible: spaces at its ends, line ends, control and direction characters.
function visible(text) {
  if (text === "") return "∅";
  return spelled(
    text
      .replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length))
      .replace(/\n/g, "↵")
      .replace(/\t/g, "⇥"),
  );
}

// Line ends and tabs stay; other characters that show nothing, or turn the direction of what follows, are spelled.
function spelled(text) {
  const code = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return text.replace(/(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Cn}]/gu, code);
}

// The same as an element, its marks of spaces fainter. bdi: a text that runs from right to left keeps to itself.
function word(text, attributes = {}) {
  const [, before, middle, after] = visible(text).match(/^(·*)(.*?)(·*)$/su);
  const mark = (dots) => (dots ? el("span", { class: "mark" }, dots) : null);
  return el("bdi", { class: "word", ...attributes }, mark(before), middle, mark(after));
}

function wordOf(id) {
  const text = textOf(id);
  return text === null ? el("bdi", { class: "word", "data-id": id }, `token ${id}`) : word(text, { "data-id": id });
}

// What is chosen, for all parts: a token of the prompt, a layer and a head. Parts ask to be told of changes.

const chosen = { token: report.tokens.length - 1, layer: 0, head: 0 };
const watchers = [];

function watch(draw) {
  watchers.push(draw);
  draw();
}

function choose(change) {
  if (Object.entries(change).every(([name, value]) => chosen[name] === value)) return;
  Object.assign(chosen, change);
  for (const draw of watchers) draw();
}

// What a button without words is called, for eyes and ears.
function call(button, name) {
  button.title = name;
  button.setAttribute("aria-label", name);
}

// Colour: CSS mixes it, from a share between -1 and 1, so that light, dark and paper need no script.
function shade(element, share) {
  const size = Math.min(Math.abs(share), 1);
  element.classList.add("heat");
  element.classList.toggle("minus", share < 0);
  element.classList.toggle("strong", size > 0.57); // dark letters in the dark, and on light paper
  element.classList.toggle("full", size > 0.72); // white ones: where they can be read better than the others
  element.style.setProperty("--p", size.toFixed(4));
}

// One tab stop for many buttons; arrow keys, Home and End move among them. `columns()` says how many make a row.
// Returns a function that moves the stop.
function roving(container, columns) {
  let stop = null;
  const stops = () => [...container.querySelectorAll("button")];
  const go = (to) => {
    for (const button of stop ? [stop] : stops()) button.tabIndex = -1;
    to.tabIndex = 0;
    stop = to;
  };
  container.addEventListener("focusin", (event) => event.target.tagName === "BUTTON" && go(event.target));
  container.addEventListener("keydown", (event) => {
    const all = stops();
    const here = all.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    const target = { Home: 0, End: all.length - 1 }[event.key] ?? here + steps[event.key];
    if (here < 0 || !all[target]) return;
    event.preventDefault();
    all[target].focus();
  });
  return go;
}

// The same, of which one button is pressed. Returns a function that presses one.
function pressing(container, columns) {
  const go = roving(container, columns);
  let pressed = null;
  return (button) => {
    pressed?.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    pressed = button;
    go(button);
  };
}

// How many buttons of a wrapping line stand in the first one.
function firstLine(container) {
  const buttons = [...container.querySelectorAll("button")];
  return Math.max(
    buttons.findIndex((button) => button.offsetTop > buttons[0].offsetTop),
    1,
  );
}

// The prompt as a line of buttons, each with something below its word. below: (i) -> node or null; share: (i) -> number
// in [-1, 1]. Returns a function that shows which token is chosen; where numbers depend on that (`live`), it draws anew.
function tokenLine(place, label, { below, share = () => 0, dim = () => false, live = false }) {
  const line = el("div", { class: "line", role: "group", "aria-label": label });
  const press = pressing(line, () => firstLine(line));
  const unders = report.tokens.map(() => el("span", { class: "below" }));
  const buttons = report.tokens.map((token, i) => {
    const pick = () => choose({ token: i });
    return el(
      "button",
      { type: "button", "aria-pressed": "false", onclick: pick, onfocus: pick, onpointerenter: pick },
      word(token.text),
      unders[i],
    );
  });
  const draw = () =>
    buttons.forEach((button, i) => {
      unders[i].replaceChildren(below(i) ?? " ");
      button.classList.toggle("dim", dim(i));
      shade(button, share(i));
    });
  line.append(...buttons);
  place.append(line);
  if (!live) draw();
  return () => {
    if (live) draw();
    press(buttons[chosen.token]);
  };
}

// One of a few ways to look at something.
function choices(label, names, start, pick) {
  const group = el("div", { class: "choices", role: "group", "aria-label": label }, el("span", {}, `${label}:`));
  for (const [key, text] of Object.entries(names)) {
    group.append(
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(key === start),
          onclick: (event) => {
            for (const button of group.querySelectorAll("button"))
              button.setAttribute("aria-pressed", button === event.currentTarget);
            pick(key);
          },
        },
        text,
      ),
    );
  }
  return group;
}

function paragraph(kind, ...children) {
  return el("p", { class: kind }, ...children);
}

// A sentence that follows what is chosen: it is read out when it changes.
function sentence() {
  return el("p", { class: "sentence", "aria-live": "polite" });
}

function table(kind, heads, rows) {
  const top = el("tr", {}, ...heads.map((name) => el("th", { scope: "col" }, name)));
  return el("table", { class: kind }, el("thead", {}, top), el("tbody", {}, ...rows));
}

// A bar as long as a share of its place, between -1 and 1.
function barOf(share, kind = "") {
  const bar = el("span", { class: `bar ${kind}` }, el("span"));
  bar.firstChild.style.width = `${(100 * Math.min(Math.abs(share), 1)).toFixed(2)}%`;
  bar.classList.toggle("minus", share < 0);
  return bar;
}

// Rows of (word, number, bar): [{word, number, share}].
function bars(rows) {
  return el("div", { class: "bars" }, ...rows.flatMap((row) => [row.word, row.number, barOf(row.share)]));
}

// Calls react(width) where an element gets another width than it had: at first, too.
function onWidth(element, react) {
  let width = null;
  const look = () => {
    if (element.clientWidth === width) return;
    width = element.clientWidth;
    requestAnimationFrame(() => react(width));
  };
  new ResizeObserver(look).observe(element);
}

function body(id) {
  return document.querySelector(`#${id} .body`);
}
