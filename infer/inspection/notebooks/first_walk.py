# %% [markdown]
# # A first walk: from a text to the next word
#
# A language model is given a text and says, for every word it knows, how likely it comes next. This notebook walks
# that way once, on a real model, without skipping a step:
#
#     text -> tokens -> embeddings -> 30 layers of attention and MLP -> logits -> softmax -> next token
#
# Every step is computed here in plain NumPy, in a few lines, and then compared with what the model itself computed at
# the same place. An `assert` after each step says so: if this notebook runs to its end, all of it is true.
#
# The model is SmolLM2-135M, which `"demo"` names (`make demo` installs it; the pictures need matplotlib, too:
# `pip install -e '.[plot]'`). It is built like Phi-3, only much smaller.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection
from phi3_jax.model.rope import cos_sin, rotate

checkpoint = phi3_jax.load("demo")
config, params, tokenizer = checkpoint.config, checkpoint.params, checkpoint.tokenizer
weights = jax.tree.map(np.asarray, params)  # the same numbers as NumPy arrays

L, N, K, H = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"{L} layers, {N} heads with {K} sets of keys and values, {config.hidden_size} numbers per word")

# %% [markdown]
# ## 1. The text becomes tokens
#
# The model knows 49,152 pieces of text, its vocabulary. The tokenizer cuts the text into such pieces and looks up their
# numbers. A common word is one piece, with the space in front of it: " France" and "France" are two different tokens.

# %%
text = "The capital of France is"
ids = tokenizer.encode(text)
words = [tokenizer.decode([token]) for token in ids]
for token, word in zip(ids, words, strict=True):
    print(f"{token:6}  {word!r:12} {list(word.encode())}")

assert tokenizer.decode(ids) == text
FRANCE, LAST = words.index(" France"), len(ids) - 1

# %% [markdown]
# ## 2. Each token becomes an embedding
#
# The embedding is a table with a row of 576 numbers for each token; the model learned them. A number says nothing by
# itself, but rows can be compared: the smaller the angle between two, the closer what the model has learned of the
# words. (A cosine of 1 is the same direction, 0 has nothing in common.)

# %%
table = weights["embed_tokens"]["weight"]  # [V, D]
x = table[ids]  # [T, D]


def nearest(token, count=6):
    """The tokens whose rows point most nearly in the same direction, and their cosines."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit[token]
    return [(tokenizer.decode([int(i)]), round(float(cosines[i]), 2)) for i in np.argsort(-cosines)[1 : count + 1]]


for word in (" France", " king", " Monday"):
    print(f"{word!r:10} {nearest(tokenizer.encode(word)[0])}")

own, cosines = inspection.nearest(config, params, table[ids[FRANCE]], top=7)  # the same, in the library
assert [tokenizer.decode([int(i)]) for i in own[1:]] == [word for word, _ in nearest(ids[FRANCE])]

# %% [markdown]
# What does the model itself have at this point? `inspection.run` runs the model and returns the values that we name.
# `embed` is this one; `resid_pre` is what goes into each layer, and so on. We ask for all that we need below at once.

# %%
seen = inspection.run(config, params, [ids], ["embed", "resid_*", "attn.pattern", "attn_out", "logits"])
seen = {name: np.asarray(value) for name, value in seen.items()}
for name, value in seen.items():
    print(f"{name:16} {value.shape}")

np.testing.assert_allclose(x, seen["embed"][0], atol=1e-6)

# %% [markdown]
# ## 3. Attention: each word looks at the words before it
#
# Until here "is" knows nothing of "France". Attention is the only place where words learn from each other. In each of
# the 9 heads of a layer, a word makes a **query** (what am I looking for?), and every word a **key** (what do I have?)
# and a **value** (what do I hand over?). The better a key fits the query, the more of its value is taken. The softmax
# turns how well they fit into shares, which sum to 1.
#
# Queries and keys are rotated by an angle that grows with the word's place, so that how well they fit depends on how
# far apart the words are. Three heads share a set of keys and values ("grouped queries"), which saves memory.


# %%
def softmax(scores):
    """Numbers of any size become shares that sum to 1."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def norm(x, scale):
    """Brings each word's numbers to a common size."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * scale


def attention(x, own):
    """x [T, D] -> (what attention adds [T, D], who looks where [N, T, T])."""
    T = len(x)
    qkv = (x @ own["qkv_proj"]["weight"].T).reshape(T, N + 2 * K, H)
    q, k, v = qkv[:, :N], qkv[:, N : N + K], qkv[:, N + K :]
    cos, sin = cos_sin(config, np.arange(T)[None], np.array([[T]]), np.float32)
    q, k = (np.asarray(rotate(each[None], cos, sin))[0] for each in (q, k))
    k, v = (np.repeat(each, N // K, axis=1) for each in (k, v))  # a set for each head
    scores = np.einsum("TNH,SNH->NTS", q, k) / np.sqrt(H)
    later = np.triu(np.ones((T, T), bool), 1)
    pattern = softmax(np.where(later, -np.inf, scores))  # nobody sees what comes later
    z = np.einsum("NTS,SNH->TNH", pattern, v)
    return z.reshape(T, -1) @ own["o_proj"]["weight"].T, pattern


first = jax.tree.map(lambda stack: stack[0], weights["layers"])
attended, pattern = attention(norm(x, first["input_layernorm"]["weight"]), first["self_attn"])
np.testing.assert_allclose(attended, seen["attn_out"][0, 0], atol=1e-3)
np.testing.assert_allclose(pattern, seen["attn.pattern"][0, 0], atol=1e-4)
print("In layer 0, head 0, the last word looks at", dict(zip(words, pattern[0, -1].round(2).tolist(), strict=True)))

# %% [markdown]
# ## 4. A layer: attention, then the MLP, each added to what was there
#
# What a layer computes does not replace the word's 576 numbers but is **added** to them. So there is one stream of
# numbers per word, the *residual stream*, which runs from the embedding to the end, and to which each layer adds its
# part. The MLP looks at one word at a time: it is where much of what the model knows is thought to be.


# %%
def mlp(x, own):
    """x [T, D] -> what the MLP adds [T, D]: it widens to F features, opens or closes each by a gate, and goes back."""
    gate, up = np.split(x @ own["gate_up_proj"]["weight"].T, 2, axis=-1)
    return (up * gate / (1 + np.exp(-gate))) @ own["down_proj"]["weight"].T


stream, patterns = x, []
for number in range(L):
    own = jax.tree.map(lambda stack, number=number: stack[number], weights["layers"])
    np.testing.assert_allclose(stream, seen["resid_pre"][number, 0], rtol=1e-3, atol=2e-2)
    attended, pattern = attention(norm(stream, own["input_layernorm"]["weight"]), own["self_attn"])
    stream = stream + attended
    stream = stream + mlp(norm(stream, own["post_attention_layernorm"]["weight"]), own["mlp"])
    patterns.append(pattern)

patterns = np.stack(patterns)  # [L, N, T, T]
np.testing.assert_allclose(stream, seen["resid_post"][-1, 0], rtol=1e-3, atol=2e-2)
np.testing.assert_allclose(patterns, seen["attn.pattern"][:, 0], atol=1e-3)
print("thirty layers by hand, equal to the model's")

# %% [markdown]
# Where does the last word look, on its way through the layers? On the left the mean of all heads: most of it goes to
# the first word. That is where a head rests that has nothing to do: heads cannot look nowhere, since the shares have to
# sum to 1. On the right the one head, of all 270, that looks at " France" most.

# %%
layer, head = np.unravel_index(patterns[:, :, LAST, FRANCE].argmax(), (L, N))
share = patterns[layer, head, LAST, FRANCE]
print(f"layer {layer}, head {head}: the last word looks at {words[FRANCE]!r} with {share:.2f}")
assert (layer, head) == (23, 4)
assert 0.85 < share < 0.95

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), width_ratios=(1.3, 1), num="attention")
left.imshow(patterns[:, :, LAST].mean(axis=1), aspect="auto", cmap="Blues", vmin=0, vmax=1)
left.set(xticks=range(len(words)), xticklabels=words, ylabel="layer", title="the last word, mean of the heads")
right.imshow(patterns[layer, head], cmap="Blues", vmin=0, vmax=1)
for (query, key), value in np.ndenumerate(patterns[layer, head]):
    if key <= query:
        right.text(key, query, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
right.set(xticks=range(len(words)), xticklabels=words, yticks=range(len(words)), yticklabels=words)
right.set(xlabel="is looked at", ylabel="looks", title=f"layer {layer}, head {head}")
right.tick_params(axis="x", rotation=30)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 5. Logits: how well each word of the vocabulary fits
#
# After the last layer, the stream of the **last** word is compared with a row for each of the 49,152 tokens. In this
# model these are the rows of the embedding again. The results are the logits.

# %%
final = norm(stream, weights["norm"]["weight"])
logits = final @ table.T  # [T, V]
np.testing.assert_allclose(logits, seen["logits"][0], atol=2e-2)
print({tokenizer.decode([int(i)]): round(float(logits[LAST, i]), 1) for i in np.argsort(-logits[LAST])[:5]})

# %% [markdown]
# The same can be asked earlier: what would the model say if it stopped after layer 10? This is called the *logit lens*.
# We ask at which place " Paris" would be among all tokens, after each layer's attention and after its MLP. For twenty
# layers it is nowhere. Then layer 23, where a head looks at " France", lifts it at once, and the rest do so slowly.


# %%
def place(token, streams):
    """1 if the stream would say this token first, and so on."""
    logits = norm(streams, weights["norm"]["weight"]) @ table.T
    return 1 + (logits > logits[..., [token]]).sum(axis=-1)


paris = tokenizer.encode(" Paris")[0]
places = {name: place(paris, seen[name][:, 0, LAST]) for name in ("resid_mid", "resid_post")}
for number in (0, 10, 20, 22, 23, 24, 27, 28, 29):
    print(f"layer {number:2}: {places['resid_mid'][number]:6} {places['resid_post'][number]:6}")

lens = inspection.logit_lens(config, params, [ids], target=paris, positions=[-1])  # the same, in the library
for name, own in lens.items():
    np.testing.assert_allclose(own.target_rank[:, 0, 0] + 1, places[name], rtol=0.01, atol=1)
assert places["resid_post"][22] > 1000 > 500 > places["resid_mid"][23]
assert places["resid_post"][-1] == 1

figure, axes = plt.subplots(figsize=(6, 3.2), num="lens")
axes.semilogy(places["resid_mid"], label="after attention")
axes.semilogy(places["resid_post"], label="after the MLP")
axes.set(xlabel="layer", ylabel="place of ' Paris'", title="the logit lens")
axes.invert_yaxis()
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# And what is it that attention adds in layer 23? We read it as if it were a stream: it says "France", not yet "Paris".

# %%
added = (seen["attn_out"][layer, 0, LAST] * weights["norm"]["weight"]) @ table.T
says = [tokenizer.decode([int(i)]) for i in np.argsort(-added)[:4]]
print(f"attention of layer {layer} adds {says}")
assert says[0] == " France"

# %% [markdown]
# ## 6. Softmax: logits become probabilities
#
# `exp` makes every logit positive, and dividing by the sum makes them sum to 1. One more in the logit is 2.7 times as
# likely. *Entropy* says how open the model is: e to its power is about how many words it chooses from.

# %%
probabilities = softmax(logits[LAST])
assert abs(probabilities.sum() - 1) < 1e-4
entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum()
np.testing.assert_allclose(entropy, inspection.entropy(logits[LAST]), atol=1e-3)
print(f"entropy {entropy:.2f}: as open as {np.exp(entropy):.1f} words of the same probability")

order = np.argsort(-probabilities)[:10]
figure, axes = plt.subplots(figsize=(6, 3.2), num="next")
axes.barh([tokenizer.decode([int(i)]) for i in order][::-1], probabilities[order][::-1])
axes.set(xlabel="probability", title=f"{text} ...")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## 7. The next token
#
# The simplest way is to take the most likely one (*greedy*). The model's own program for writing text does just that,
# unless told otherwise, and gets the same word.

# %%
greedy = int(probabilities.argmax())
result = phi3_jax.infer.generate(checkpoint, [text], max_new_tokens=1)[0]
assert result.token_ids == [greedy]
assert result.text == " Paris"
print(text + result.text)

# %% [markdown]
# The other way is to draw, as with dice that are loaded by the probabilities. The *temperature* divides the logits
# before the softmax: below 1 the likely words become likelier, above 1 the others get their chance.

# %%
for temperature in (0.5, 1.0, 2.0):
    heated = softmax(logits[LAST] / temperature)
    drawn = np.random.default_rng(0).choice(len(heated), size=8, p=heated / heated.sum())
    print(f"temperature {temperature}: Paris {heated[paris]:.0%}, drawn {[tokenizer.decode([int(i)]) for i in drawn]}")

# %% [markdown]
# That was one word. To write on, the model puts it behind the text and does all of this again.
