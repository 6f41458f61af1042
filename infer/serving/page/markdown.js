// Markdown as models write it -> DOM nodes: headings, lists, quotes, tables, code. HTML is shown as the text that it is.
// Blocks are found line by line and hold others to a fixed depth; any text is shown, complete or not.

import { inline } from "./inline.js";
import { button, copy, element, spelled, together } from "./parts.js";

const DEPTH = 8; // of quotes and lists within one another
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/; // all of the marks: fewer of them are not tried
const HEADING = /^ {0,3}(#{1,6})(?:\s+([^]*))?$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|(\d{1,9})[.)])(?=\s|$)/;

function isRule(line) {
  return /^(?:-{3,}|\*{3,}|_{3,})$/.test(line.replace(/\s+/g, ""));
}

function isBlank(line) {
  return !/\S/.test(line);
}

// Columns of space at a line's beginning, and a line without as many of them.
function indentOf(line) {
  return line.match(/^[ \t]*/)[0].replaceAll("\t", "    ").length;
}

function outdent(line, columns) {
  let at = 0;
  for (let column = 0; column < columns && (line[at] === " " || line[at] === "\t"); at++)
    column += line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

// Where the blocks of some lines begin and end: [{ build, from, to }]. That all but the last of them stay as they are
// when lines are added is what `Answer` relies on.
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [build, to] = blockAt(lines, at);
    blocks.push({ build, from: at, to });
    at = to;
  }
  return blocks;
}

// Does a line begin something that ends a paragraph?
function begins(lines, at) {
  const line = lines[at];
  const item = line.match(ITEM);
  if (item) return isRule(line) || (item[3] ? item[3] === "1" : line.trim().length > 1);
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line) || isTable(lines, at);
}

// The block at a line that is not blank -> (a function that builds its node from its lines, the line after it).
function blockAt(lines, at) {
  const line = lines[at];
  const next = (stays, to = at + 1) => {
    while (to < lines.length && stays(lines[to], to)) to += 1;
    return to;
  };
  if (FENCE.test(line)) {
    const [, marks] = line.match(FENCE);
    return [code, Math.min(next((each) => !isClosing(each, marks)) + 1, lines.length)];
  }
  if (HEADING.test(line)) return [heading, at + 1];
  if (isRule(line)) return [() => element("hr"), at + 1];
  if (QUOTE.test(line)) return [quote, next((each) => QUOTE.test(each))];
  if (ITEM.test(line)) return [list, endOfList(lines, at)];
  if (isTable(lines, at)) return [table, next((each) => each.includes("|"), at + 2)];
  return [paragraph, next((each, i) => !isBlank(each) && !begins(lines, i))];
}

function nodes(lines, depth) {
  if (depth > DEPTH) return lines.some((line) => !isBlank(line)) ? [paragraph(lines)] : [];
  return split(lines).map(({ build, from, to }) => build(lines.slice(from, to), depth));
}

function paragraph(lines) {
  return element("p", { dir: "auto" }, inline(lines.map((line) => line.trimStart()).join("\n")));
}

// The page has headings of two levels of its own.
function heading([line]) {
  const [, marks, text = ""] = line.match(HEADING);
  const words = text.trimEnd().replace(/(?:^|\s)#+$/, "");
  return element(`h${Math.min(marks.length + 2, 6)}`, { dir: "auto" }, inline(words));
}

function quote(lines, depth) {
  const inside = lines.map((line) => line.replace(QUOTE, ""));
  return element("blockquote", { dir: "auto" }, together(nodes(inside, depth + 1)));
}

function isClosing(line, marks) {
  const found = line.trim();
  return found.length >= marks.length && indentOf(line) < 4 && found === marks[0].repeat(found.length);
}

function code(lines) {
  const [, marks, info] = lines[0].match(FENCE);
  const closed = lines.length > 1 && isClosing(lines.at(-1), marks);
  const indent = indentOf(lines[0]);
  const text = lines.slice(1, closed ? -1 : undefined).map((line) => outdent(line, indent)).join("\n");
  const language = info.trim().split(/\s/)[0].slice(0, 40);
  const label = language ? `Code, ${spelled(language)}` : "Code";
  const copying = button("Copy", (pressed) => copy(text, pressed), { title: "Copy this code" });
  const head = element("div", { class: "bar" }, element("span", {}, spelled(language) || "code"), copying);
  const pre = element("pre", { tabindex: "0", role: "region", "aria-label": label, dir: "ltr" });
  pre.append(element("code", {}, spelled(text)));
  return element("div", { class: "code" }, head, pre);
}

// Lists: an item goes on in lines that are indented by two or more, and in those that only go on with its paragraph.

function kindOf(item) {
  return item[3] ? item[2].at(-1) : item[2];
}

// A function: is a line the beginning of another item of the list that began with a line?
function nextItemOf(line) {
  const kind = kindOf(line.match(ITEM));
  const inside = indentOf(line) + 2;
  return (other) => {
    const item = other.match(ITEM);
    return item && indentOf(item[1]) < inside && !isRule(other) && kindOf(item) === kind;
  };
}

function endOfList(lines, at) {
  const isNext = nextItemOf(lines[at]);
  const inside = indentOf(lines[at]) + 2;
  let to = at + 1;
  for (let i = at + 1; i < lines.length; i++) {
    if (isBlank(lines[i])) continue;
    const goesOn = indentOf(lines[i]) >= inside || (i === to && !begins(lines, i) && !ITEM.test(lines[i]));
    if (!goesOn && !isNext(lines[i])) break;
    to = i + 1;
  }
  return to;
}

function list(lines, depth) {
  const [, , , number] = lines[0].match(ITEM);
  const isNext = nextItemOf(lines[0]);
  const items = [];
  for (let at = 0; at < lines.length; ) {
    let to = at + 1;
    while (to < lines.length && !isNext(lines[to])) to += 1;
    items.push(listItem(lines.slice(at, to), depth));
    at = to;
  }
  const attributes = { dir: "auto", ...(number && { start: Number(number) }) };
  return element(number ? "ol" : "ul", attributes, together(items));
}

function listItem(lines, depth) {
  const [before] = lines[0].match(ITEM);
  const width = indentOf(lines[0]) + before.trimStart().length + 1;
  const rest = lines[0].slice(before.length + 1);
  const task = rest.match(/^\[([ xX])\] /);
  const inside = [task ? rest.slice(4) : rest, ...lines.slice(1).map((line) => outdent(line, width))];
  const item = element("li", {}, together(nodes(inside, depth + 1)));
  if (task) (item.querySelector("p") ?? item).prepend(task[1] === " " ? "☐ " : "☑ ");
  return item;
}

// Tables.

function cells(line) {
  const texts = [""];
  for (const piece of line.trim().split(/(\\?\|)/)) {
    if (piece === "|") texts.push("");
    else texts[texts.length - 1] += piece === "\\|" ? "|" : piece;
  }
  if (texts[0] === "") texts.shift(); // before the first bar
  if (texts.length && texts.at(-1).trim() === "") texts.pop();
  return texts.map((text) => text.trim());
}

function isTable(lines, at) {
  const rule = lines[at + 1];
  if (rule === undefined || !lines[at].includes("|") || !/^[\s|:-]+$/.test(rule) || !rule.includes("-")) return false;
  const marks = cells(rule);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[at]).length;
}

function table(lines) {
  const sides = cells(lines[1]).map((mark) => (mark.endsWith(":") ? (mark[0] === ":" ? "center" : "right") : "left"));
  const cell = (tag, attributes) => (text, i) =>
    element(tag, { ...attributes, class: sides[i], dir: "auto" }, inline(text));
  const row = (line, ...kind) => element("tr", {}, together(cells(line).slice(0, sides.length).map(cell(...kind))));
  const head = element("thead", {}, row(lines[0], "th", { scope: "col" }));
  const body = element("tbody", {}, together(lines.slice(2).map((line) => row(line, "td", {}))));
  const frame = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" };
  return element("div", frame, element("table", {}, head, body));
}

// An answer on the page, as it grows. Blocks that are complete are added once, so that a screen reader reads each once;
// the last is made anew with each change, and is not read out before it is complete.
export class Answer {
  constructor() {
    this.done = element("div");
    this.open = element("div", { "aria-live": "off" });
    this.element = element("div", { class: "words" }, this.done, this.open);
    this.start = 0; // in the text: where the block that is still open begins
  }

  // `text` is that of the last call and more, or the same.
  show(text, whole) {
    const lines = text.replace(/\r\n?/g, "\n").slice(this.start).split("\n");
    const partial = whole ? [] : [lines.pop()]; // the line that is being written may come to mean something else
    const blocks = split(lines);
    const last = whole ? null : blocks.pop();
    for (const { build, from, to } of blocks) this.done.append(build(lines.slice(from, to), 1));
    const rest = last ? lines.slice(last.from) : [];
    if (last) for (const line of lines.slice(0, last.from)) this.start += line.length + 1;
    this.open.replaceChildren(together(nodes([...rest, ...partial], 1)));
  }
}
