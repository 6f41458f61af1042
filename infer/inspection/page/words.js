// The parts about the text itself: its tokens, their embeddings, and how surprising each was.

function drawTokens() {
  const place = body("tokens");
  const detail = el("dl", { class: "detail", "aria-live": "polite" });
  const line = tokenLine(place, "The tokens of the text", { below: (i) => num(`tokens.${i}.id`, 0) });
  place.append(detail);
  const item = (name, ...content) => [el("dt", {}, name), el("dd", {}, ...content)];
  watch(() => {
    line();
    const t = chosen.token;
    const token = report.tokens[t];
    const bytes = token.bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
    detail.replaceChildren(
      ...item("token", word(token.text), ` (place ${t}, counted from 0)`),
      ...item("number", num(`tokens.${t}.id`, 0), ` of ${large(report.model.vocab)}`),
      ...item("in the vocabulary", el("bdi", { class: "word" }, visible(token.piece ?? ""))),
      ...item(token.bytes.length === 1 ? "byte" : `${token.bytes.length} bytes`, el("code", {}, bytes || "none")),
    );
  });
}

function drawEmbedding() {
  const place = body("embedding");
  const nearest = el("div", { "aria-live": "polite" });
  const longest = Math.max(...report.embedding.norms);
  const line = tokenLine(place, "The norm of each token's embedding", {
    below: (i) => num(`embedding.norms.${i}`),
    share: (i) => (0.6 * report.embedding.norms[i]) / longest,
  });
  place.append(nearest);
  watch(() => {
    line();
    const t = chosen.token;
    nearest.replaceChildren(
      el("h3", {}, "Nearest to ", word(report.tokens[t].text), ", by cosine"),
      bars(
        report.embedding.nearest[t].map(([id, cosine], i) => ({
          word: wordOf(id),
          number: num(`embedding.nearest.${t}.${i}.1`),
          share: cosine,
        })),
      ),
    );
  });
}

function drawSurprise() {
  const place = body("surprise");
  const { surprise, entropy } = report;
  const most = Math.max(...surprise, ...(entropy ?? []));
  const known = surprise.filter((x) => x !== null);
  place.append(el("h3", {}, "Surprise at each token"));
  const first = tokenLine(place, "Surprise at each token, in nats", {
    below: (i) => num(`surprise.${i}`),
    share: (i) => (surprise[i] ?? 0) / most,
  });
  if (known.length) {
    const mean = known.reduce((sum, x) => sum + x, 0) / known.length;
    place.append(
      el(
        "p",
        { class: "note" },
        `Mean ${format(mean, 2)} nats: a perplexity of ${format(Math.exp(mean), 1)}. ` +
          "Nothing comes before the first token, so that nobody guessed it.",
      ),
    );
  }
  if (!entropy) return watch(first);
  place.append(el("h3", {}, "Entropy of the guess after each token"));
  const second = tokenLine(place, "Entropy of the guess after each token, in nats", {
    below: (i) => num(`entropy.${i}`),
    share: (i) => entropy[i] / most,
  });
  watch(() => (first(), second()));
}
