// What the other files share: elements, text that hides nothing, the clipboard.

// The attributes come last: under dir=auto Chromium would look through all text once more for each child.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Any number of nodes as one: a function takes so many arguments only.
export function together(nodes) {
  const made = document.createDocumentFragment();
  for (const node of nodes) made.append(node);
  return made;
}

export function button(name, act, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, name);
  made.addEventListener("click", () => act(made));
  return made;
}

// Control characters, and those that turn the direction of what follows, would show another text than there is.
export function spelled(text) {
  const code = (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
  return text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, code);
}

// Puts text on the clipboard; the button says whether it is there. Without https there is only the older way.
export async function copy(text, pressed) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const place = element("textarea", { readonly: "" });
    place.value = text;
    document.body.append(place);
    place.select();
    done = document.execCommand("copy");
    place.remove();
    pressed.focus();
  }
  pressed.textContent = done ? "Copied" : "Not copied";
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}
