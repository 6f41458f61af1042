// The chat: turns on the page and in memory, what one types and presses, one answer at a time.

import { Answer } from "./markdown.js";
import { button, copy, element, spelled } from "./parts.js";
import { KeyWanted, Server } from "./server.js";

const at = (id) => document.getElementById(id);
const log = at("log");
const message = at("message");
const server = new Server();
const touched = matchMedia("(hover: none) and (pointer: coarse)").matches; // there Enter is the only way to a new line

let models = [];
let turns = []; // { role, text, element, under, view of an answer }
let running = null; // the AbortController of the answer that is being written
let following = true; // the end of the answer, unless one has scrolled away from it

// What goes wrong is said on the page: nobody looks at a console.
function tell(text) {
  at("problem").textContent = spelled(text);
}

addEventListener("error", (event) => tell(`Error of this page: ${event.message}`));
addEventListener("unhandledrejection", (event) => tell(`Error of this page: ${event.reason?.message ?? event.reason}`));

// Keys and models.

// Does something that may need a key; asks for one as often as it takes.
async function withKey(work) {
  while (true) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof KeyWanted) || !(await askForKey(server.key ? error.message : ""))) throw error;
    }
  }
}

// -> was one given?
function askForKey(problem) {
  const dialog = at("key-dialog");
  at("key-problem").textContent = spelled(problem);
  at("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
  });
}

at("no-key").addEventListener("click", () => at("key-dialog").close());
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    at("key-problem").textContent = "A key has letters, digits and signs only, without spaces.";
    return;
  }
  server.remember(key);
  at("key").value = "";
  at("key-dialog").close("given");
});

async function loadModels() {
  models = await withKey(() => server.models());
  at("models").hidden = models.length < 2;
  at("model").hidden = !at("models").hidden;
  at("model").textContent = spelled(models[0] ?? "");
  at("models").querySelector("select").replaceChildren(...models.map((name) => new Option(spelled(name), name)));
}

// Turns.

function addTurn(role, name, said, more = {}) {
  const under = element("div", { class: "under", "aria-live": "off" });
  const whole = element("article", role === "user" ? { class: "mine" } : {}, element("h2", {}, name), said, under);
  const turn = { role, text: "", element: whole, under, ...more };
  turns.push(turn);
  log.append(whole);
  return turn;
}

function addQuestion(text) {
  addTurn("user", "You", element("p", { class: "said", dir: "auto" }, spelled(text)), { text });
}

function removeTurns(from) {
  for (const turn of turns.splice(from)) turn.element.remove();
}

// What the model gets: an answer that failed before its first word is left out, and two questions in a row are one.
function messages() {
  const system = at("system").value.trim();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const { role, text } of turns) {
    if (role === "assistant" && !text) continue;
    if (role === "user" && found.at(-1)?.role === "user") found.at(-1).content += `\n\n${text}`;
    else found.push({ role, content: text });
  }
  return found;
}

function request() {
  const chosen = at("models").querySelector("select").value;
  const body = { model: chosen, messages: messages() };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if (at(name).value !== "") body[name] = at(name).valueAsNumber;
  return body;
}

// Answers.

function follow() {
  if (following) log.scrollTop = log.scrollHeight;
}

log.addEventListener("scroll", () => {
  following = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
});

// Draws what has come of an answer, again and again until `stop` is called: at most a fifth of the time goes into it.
function drawing(turn, started) {
  let timer = null;
  let drawn = null;
  const draw = () => {
    const begun = performance.now();
    if (turn.text !== drawn) turn.view.show(turn.text, false);
    drawn = turn.text;
    const seconds = ((begun - started) / 1000).toFixed(0);
    turn.under.textContent = `${turn.text ? "Writing" : "Waiting for the first word"} … ${seconds} s`;
    follow();
    timer = setTimeout(draw, Math.max(40, 4 * (performance.now() - begun)));
  };
  draw();
  return () => clearTimeout(timer);
}

const ENDS = { length: "It ends here because the limit of tokens is reached.", stop: "", tool_calls: "" };

// Writes an answer to the turns so far.
async function write() {
  if (running) return;
  const mine = new AbortController();
  const view = new Answer();
  const started = performance.now();
  const seen = { first: null, usage: null, reason: null };
  setRunning(mine);
  tell("");
  following = true;
  const turn = addTurn("assistant", "Answer", view.element, { view });
  const stopDrawing = drawing(turn, started);
  let problem = "";
  try {
    if (!models.length) await loadModels();
    const body = request();
    await withKey(() => receive(turn, body, mine.signal, seen));
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
  }
  stopDrawing();
  mine.abort(); // where what came made no sense, the rest is not waited for
  view.show(turn.text, true);
  problem ||= ENDS[seen.reason] ?? (seen.reason ? `It ended early: ${seen.reason}.` : "");
  if (problem) turn.under.before(element("p", { class: "problem" }, spelled(problem)));
  turn.under.replaceChildren();
  const copying = button("Copy", (pressed) => copy(turn.text, pressed), { title: "Copy this answer" });
  if (turn.text) turn.under.append(copying);
  turn.under.append(element("span", { class: "note" }, figures(seen, started)));
  if (running === mine) setRunning(null); // not if a new chat was begun
  follow();
}

async function receive(turn, body, signal, seen) {
  for await (const { choices, usage } of server.answer(body, signal)) {
    const [choice] = choices ?? [];
    const text = choice?.delta?.content ?? choice?.delta?.refusal ?? "";
    if (text) seen.first ??= performance.now();
    turn.text += text;
    seen.reason = choice?.finish_reason ?? seen.reason;
    seen.usage = usage ?? seen.usage;
  }
}

// How long it took, and how many tokens the server says that there were.
function figures({ first, usage }, started) {
  const seconds = (until) => ((until - started) / 1000).toFixed(2);
  const now = performance.now();
  const parts = [];
  if (usage) {
    const count = usage.completion_tokens;
    const rate = (count / (now - started)) * 1000;
    parts.push(`${count} token${count === 1 ? "" : "s"} in ${seconds(now)} s, ${rate.toPrecision(3)} tokens/s`);
  } else parts.push(`${seconds(now)} s`);
  if (first) parts.push(`first word after ${seconds(first)} s`);
  if (usage) {
    const known = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} read${known ? `, ${known} of them known from before` : ""}`);
  }
  return parts.join("; ");
}

// What one can press.

const again = button("Try again", () => {
  removeTurns(turns.length - 1);
  write();
}, { title: "Another answer to the same message" });

const edit = button("Edit", () => {
  const last = turns.findLastIndex(({ role }) => role === "user");
  message.value = turns[last].text + (message.value && `\n${message.value}`);
  removeTurns(last);
  offer();
  grow();
  message.focus();
}, { title: "Change this message; its answer is taken away" });

// The last turns can be done again.
function offer() {
  again.remove();
  edit.remove();
  if (running || !turns.length) return;
  turns.at(-1).under.querySelector("button")?.after(again);
  if (!again.isConnected) turns.at(-1).under.prepend(again);
  turns.findLast(({ role }) => role === "user").under.append(edit);
}

function setRunning(controller) {
  running = controller;
  const inStop = document.activeElement === at("stop");
  offer();
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  if (controller && document.activeElement !== message) at("stop").focus();
  if (!controller && inStop && !touched) message.focus();
}

function stopAnswer() {
  running?.abort();
}

function send() {
  if (running || !message.value.trim()) return;
  if (!at("settings").checkValidity()) {
    showSettings(true);
    at("settings").reportValidity();
    return;
  }
  addQuestion(message.value);
  message.value = "";
  grow();
  write();
}

function newChat() {
  stopAnswer();
  removeTurns(0);
  tell("");
  setRunning(null);
  message.focus();
}

function showSettings(open) {
  at("settings").hidden = !open;
  at("settings-button").setAttribute("aria-expanded", String(open));
}

// As high as its text, up to what the style allows.
function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", stopAnswer);
at("new").addEventListener("click", newChat);
at("settings-button").addEventListener("click", () => showSettings(at("settings").hidden));
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // Enter takes what an input method proposes
  if (event.key !== "Enter" || event.shiftKey || composing || touched) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !at("key-dialog").open) stopAnswer();
});

if (touched) at("keys").textContent = "A model can be wrong.";
try {
  await loadModels();
} catch (error) {
  tell(error.message);
}
