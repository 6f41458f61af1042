// The sampler of infer/sampling (pick.py: the order; processors.py: the formulas), for one row of logits.
// Numbers are rounded to float32 where NumPy's would be: Math.fround. A token with the logit -Infinity is out.

const f32 = Math.fround;

// base64 of little-endian float32 -> Float32Array [V]
function decodeLogits(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

function largest(logits) {
  let most = -Infinity;
  for (const x of logits) if (x > most) most = x;
  return most;
}

// exp(logit - largest) / their sum
function softmax(logits) {
  const most = largest(logits);
  const weights = Float32Array.from(logits, (x) => Math.exp(f32(x - most)));
  let total = 0;
  for (const w of weights) total += w;
  return weights.map((w) => w / total);
}

function applyTemperature(logits, temperature) {
  const t = f32(temperature);
  return logits.map((x) => x / t);
}

// The k most likely tokens, and all that are as likely as the last of them.
function keepTopK(logits, k) {
  const sorted = Float32Array.from(logits).sort();
  const kth = sorted[Math.max(sorted.length - k, 0)];
  return logits.map((x) => (x < kth ? -Infinity : x));
}

// The fewest most likely tokens whose probabilities add up to p, at least one; of equally likely ones the smaller ids.
function keepTopP(logits, p) {
  const spare = f32(1 - f32(p)); // the least likely go as long as they add up to no more than this
  const order = Float32Array.from(logits).sort();
  const probs = softmax(order);
  let below = 0;
  let place = 0; // `below`: the probability of all that are less likely than order[place]
  while (place < order.length) {
    let end = place;
    let mass = 0;
    do mass += probs[end++];
    while (order[end] === order[place]); // not even once where they are NaN
    if (below + mass > spare || end === order.length) break;
    below += mass;
    place = end;
  }
  const last = order[place];
  const tied = logits.reduce((n, x) => n + (x === last), 0);
  const staying = Math.max(tied - Math.floor((spare - below) / probs[place]), 1);
  let seen = 0;
  return logits.map((x) => (x > last || (x === last && ++seen <= staying) ? x : -Infinity));
}

// The tokens that are at least p times as likely as the most likely one.
function keepMinP(logits, p) {
  const most = largest(logits);
  const least = f32(p);
  return logits.map((x) => (f32(Math.exp(f32(x - most))) < least ? -Infinity : x));
}

// The logits that a token is drawn from: temperature, then top-k, top-p, min-p, each on what the one before has left.
// settings: {temperature, topK (0: off), topP (1: off), minP (0: off)}; temperature 0 is greedy and changes nothing.
function shapeLogits(logits, settings) {
  let left = logits;
  if (!(settings.temperature > 0)) return left;
  if (settings.temperature !== 1) left = applyTemperature(left, settings.temperature);
  if (settings.topK > 0) left = keepTopK(left, settings.topK);
  if (settings.topP < 1) left = keepTopP(left, settings.topP);
  if (settings.minP > 0) left = keepMinP(left, settings.minP);
  return left;
}

// The probability of each token to be drawn; greedy: all for the smallest id of the largest logit.
function chancesOf(logits, settings) {
  if (settings.temperature > 0) return softmax(shapeLogits(logits, settings));
  const only = new Float32Array(logits.length);
  only[logits.indexOf(largest(logits))] = 1;
  return only;
}

// A draw: the first id at which the probabilities so far exceed `uniform`, in [0, 1).
function draw(chances, uniform) {
  let total = 0;
  let last = 0;
  for (const p of chances) total += p;
  for (let id = 0, sum = 0; id < chances.length; id++) {
    if (chances[id] === 0) continue;
    last = id;
    sum += chances[id];
    if (sum > uniform * total) break;
  }
  return last;
}
