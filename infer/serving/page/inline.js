// The inside of a paragraph: emphasis, code, links. What a model wrote only ever becomes text nodes; the elements are
// made here, by name, and nothing is read as HTML. One pass with a low stack of what is open: a long hostile text takes
// time in proportion to its length, and makes no deep tree.

import { element, spelled, together } from "./parts.js";

const DEPTH = 12; // of what is open at a time, and so of elements within one another
const ELEMENTS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const PLAIN = /[^\\`*_~![\]<&hH]+/y;
const LINE_BREAK = /<br *\/?>/iy;
const ENTITY = /&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{2,4}));/iy;
// (address "title"), with few spaces: all ways to divide many of them would be tried.
const TARGET = /\( {0,9}<?((?:[^\s()<>]|\([^\s()<>]*\))*)>?(?: {1,9}(?:"[^"]*"|'[^']*'))? {0,9}\)/y;
const IN_BRACKETS = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
const BARE = /https?:\/\/[^\s<>"`|[\]]+/iy;

// An address that one may follow, or null. One with a name before its host (bank@evil.org) is made to deceive.
function address(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null; // also what has no scheme: it would lead to a page of the server
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) && !url.username && !url.password ? url.href : null;
}

// Is a link's text an address with another host than that to which it leads?
function pretends(text, href) {
  const found = text.match(/^\s*(?:https?:\/\/)?([\w-]+(?:\.[\w-]+)+)(?=[/:?#\s]|$)/i);
  return found !== null && found[1].toLowerCase() !== new URL(href).hostname;
}

// Text -> a fragment.
export function inline(text) {
  const reader = new Reader(text);
  while (reader.at < text.length) reader.step();
  while (reader.stack.length > 1) reader.melt(reader.stack.length - 1);
  return together(reader.stack[0].children.map(shown));
}

function shown(child) {
  return typeof child === "string" ? spelled(child) : child;
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.stack = [{ mark: "", children: [] }]; // what is open: its mark, and strings and nodes so far
    this.ticks = null;
  }

  step() {
    const char = this.text[this.at];
    const plain = this.match(PLAIN);
    if (plain) this.put(plain[0]);
    else if (char === "\\") this.escape();
    else if (char === "`") this.code();
    else if (char === "*" || char === "_" || char === "~") this.emphasis(char);
    else if (char === "[" || (char === "!" && this.text[this.at + 1] === "[")) this.open(char === "!" ? "![" : "[");
    else if (char === "]") this.link();
    else if (char === "<") this.tag();
    else if (char === "&") this.entity();
    else if (char === "h" || char === "H") this.bare();
    else this.literal(1);
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found) this.at = pattern.lastIndex;
    return found;
  }

  put(child, { children } = this.stack.at(-1)) {
    if (typeof child === "string" && typeof children.at(-1) === "string") children[children.length - 1] += child;
    else children.push(child);
  }

  literal(length) {
    this.put(this.text.slice(this.at, this.at + length));
    this.at += length;
  }

  // An opening mark. Where too much is open, what was opened first is text.
  open(mark) {
    if (this.stack.length > DEPTH) this.melt(1);
    this.stack.push({ mark, children: [] });
    this.at += mark.length;
  }

  // What was open is text.
  melt(index) {
    const [{ mark, children }] = this.stack.splice(index, 1);
    for (const child of [mark, ...children]) this.put(child, this.stack[index - 1]);
  }

  // Closes what was opened at an index of the stack: an element around its children.
  close(index, made) {
    while (this.stack.length > index + 1) this.melt(this.stack.length - 1);
    for (const child of this.stack.pop().children) made.append(shown(child));
    this.put(made);
  }

  escape() {
    if (/[!-/:-@[-`{-~]/.test(this.text[this.at + 1] ?? "")) {
      this.at += 1;
      this.literal(1);
    } else if (this.text[this.at + 1] === "\n") this.at += 1;
    else this.literal(1);
  }

  // A code span ends at the next run of as many backticks. The places of all runs are noted once, by their lengths.
  code() {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const { 0: run, index } of this.text.matchAll(/`+/g)) {
        if (!this.ticks.has(run.length)) this.ticks.set(run.length, { places: [], next: 0 });
        this.ticks.get(run.length).places.push(index);
      }
    }
    const length = this.run("`");
    const ends = this.ticks.get(length); // none for a run whose first backtick was escaped
    while (ends && ends.places[ends.next] <= this.at) ends.next += 1;
    const end = ends?.places[ends.next];
    if (end === undefined) return this.literal(length);
    const inside = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim(); // so that it can hold backticks
    this.put(element("code", {}, spelled(padded ? inside.slice(1, -1) : inside)));
    this.at = end + length;
  }

  run(char) {
    let end = this.at;
    while (this.text[end] === char) end += 1;
    return end - this.at;
  }

  emphasis(char) {
    const length = this.run(char);
    if (length > 3 || (char === "~" && length !== 2)) return this.literal(length);
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + length] ?? " ";
    const inWord = char === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after); // snake_case
    let left = length;
    while (left && !inWord && /\S/.test(before)) {
      const index = this.stack.findLastIndex(({ mark }) => mark[0] === char && (left === 3 || mark.length === left));
      if (index < 0) break;
      left -= this.closeEmphasis(index);
    }
    if (!left) return;
    if (inWord || /\s/.test(after)) return this.literal(left);
    if (left === 3) this.open(char + char);
    this.open(left === 2 ? char + char : char);
  }

  // Of three marks together either one or two may close first. Returns how many did.
  closeEmphasis(index) {
    const [outer, inner] = this.stack.slice(index, index + 2);
    if (inner && !outer.children.length && inner.mark[0] === outer.mark[0]) {
      [outer.mark, inner.mark] = [inner.mark, outer.mark];
      index += 1;
    }
    const { mark } = this.stack[index];
    this.close(index, element(ELEMENTS[mark]));
    this.at += mark.length;
    return mark.length;
  }

  link() {
    const index = this.stack.findLastIndex(({ mark }) => mark.endsWith("["));
    this.at += 1;
    if (index < 0) return this.put("]");
    const target = this.match(TARGET);
    const href = target && address(target[1]);
    if (!href) {
      this.melt(index);
      return this.put("]" + (target?.[0] ?? ""));
    }
    this.close(index, anchor(href)); // a picture, too, is a link to it: nothing is loaded from anywhere
    const made = this.stack.at(-1).children.at(-1);
    for (const inner of made.querySelectorAll("a")) inner.replaceWith(inner.textContent);
    if (!made.textContent.trim() || pretends(made.textContent, href)) made.textContent = spelled(href);
    for (let i = this.stack.length - 1; i > 0; i--) if (this.stack[i].mark === "[") this.melt(i);
  }

  tag() {
    if (this.match(LINE_BREAK)) return this.put(element("br"));
    const found = this.match(IN_BRACKETS);
    if (!found) return this.literal(1);
    const href = address(found[1]);
    this.put(href ? anchor(href, spelled(found[1])) : found[0]);
  }

  bare() {
    const start = this.at;
    const found = /\w/.test(this.text[start - 1] ?? "") ? null : this.match(BARE);
    if (!found) return this.literal(1);
    let end = this.at;
    let unopened = found[0].split(")").length - found[0].split("(").length;
    while (/[.,:;!?'*_~]/.test(this.text[end - 1]) || (this.text[end - 1] === ")" && unopened-- > 0)) end -= 1;
    const written = this.text.slice(start, end);
    const href = address(written);
    this.at = end;
    this.put(href ? anchor(href, spelled(written)) : written);
  }

  entity() {
    const found = this.match(ENTITY);
    if (!found) return this.literal(1);
    const [all, decimal, hexadecimal, name] = found;
    const code = decimal ? Number(decimal) : parseInt(hexadecimal ?? "", 16);
    const known = code > 0 && code < 0x110000 && (code < 0xd800 || code > 0xdfff);
    this.put(name ? (ENTITIES[name] ?? all) : known ? String.fromCodePoint(code) : "\ufffd");
  }
}

// Its title says where a link leads, whatever its text says.
function anchor(href, ...children) {
  const attributes = { href, title: spelled(href), rel: "noopener noreferrer", target: "_blank" };
  return element("a", attributes, ...children);
}
