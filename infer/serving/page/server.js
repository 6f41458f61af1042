// Talks to the server that the page came from: which models it has, and answers as they are written. What goes wrong
// is an `Error` whose message is for people.

// The server wants a key, or another one.
export class KeyWanted extends Error {}

export class Server {
  constructor() {
    this.key = sessionStorage.getItem("key"); // forgotten with the tab
  }

  remember(key) {
    this.key = key;
    sessionStorage.setItem("key", key);
  }

  // The names of the models: the one that was loaded, and its adapters.
  async models() {
    const { data } = await (await this.ask("v1/models")).json();
    return data.map(({ id }) => id);
  }

  // Asks for an answer; yields its chunks, as OpenAI names their fields.
  async *answer(body, signal) {
    const whole = { ...body, stream: true, stream_options: { include_usage: true } };
    const headers = { "Content-Type": "application/json" };
    const response = await this.ask("v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(whole), signal,
    });
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream"))
      throw new Error("The server sent something else than an answer that is written piece by piece.");
    for await (const data of events(response.body.getReader())) {
      if (data === "[DONE]") return;
      const chunk = read(data);
      if (!chunk || chunk.error) throw new Error(chunk?.error?.message ?? "The server sent what is no part of an answer.");
      yield chunk;
    }
    throw broken();
  }

  async ask(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    const message = await explanation(response);
    throw response.status === 401 ? new KeyWanted(message) : new Error(message);
  }
}

async function explanation(response) {
  const text = await response.text().catch(() => "");
  const said = read(text)?.error?.message;
  const after = response.headers.get("Retry-After");
  const later = /^\d+$/.test(after) ? ` Try again in ${after} s.` : "";
  return (typeof said === "string" ? said : `The server refused: ${response.status} ${response.statusText}.`) + later;
}

function broken() {
  return new Error("The connection broke before the answer was complete.");
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// Server-sent events: the data of each.
async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = ""; // of a line that is not complete
  let data = [];
  while (true) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken();
    });
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
