# %% [markdown]
# # Heads that copy
#
# A name that nobody has heard of, read once: the second time, a language model can finish it. It cannot have learned
# the name; it looks back and copies. This notebook finds the attention heads that do it, sees how two of them work
# together, and takes them out.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection

checkpoint = phi3_jax.load("demo")
config, params, tokenizer = checkpoint.config, checkpoint.params, checkpoint.tokenizer
L, N = config.num_hidden_layers, config.num_attention_heads


def says(tokens, edits=()):
    """The most likely next tokens, and their probabilities."""
    logits = inspection.run(config, params, [tokens], positions=[-1], edits=edits)["logits"][0, 0]
    probabilities = np.asarray(jax.nn.softmax(logits))
    return {tokenizer.decode([int(i)]): round(float(probabilities[i]), 2) for i in np.argsort(-probabilities)[:3]}


story = tokenizer.encode('Mrs Quibbleworth opened the door. Behind the door stood a cat. "Come in," said Mrs Qu')
once = tokenizer.encode('Behind the door stood a cat. "Come in," said Mrs Qu')
print("having read the name:    ", says(story))
print("without having read it:  ", says(once))
assert says(story)["ib"] > 0.9
assert "ib" not in says(once)

# %% [markdown]
# ## A text without sense, twice
#
# To see copying and nothing else, we take 25 tokens by chance and repeat them. No meaning helps here. How surprised is
# the model by each token? (Surprise is -log p: 0 if it was sure of it, about 11 if it had no idea, and more if it was
# sure of something else.)

# %%
HALF = 25
random = np.random.default_rng(0).integers(1000, 40000, (4, HALF))
tokens = np.tile(random, 2)  # [B, T]: four such texts


def look(edits=()):
    """The patterns [L, B, N, T, T] of the texts, and the surprise [B, T - 1] at each token but the first."""
    seen = inspection.run(config, params, tokens, ["attn.pattern", "logits"], edits=edits)
    surprise = inspection.surprise(seen["logits"], tokens)[:, 1:]
    return np.asarray(seen["attn.pattern"]), np.asarray(surprise)


pattern, surprise = look()
first, second = surprise[:, : HALF - 1].mean(), surprise[:, HALF:].mean()
print(f"first time {first:.1f}, second time {second:.1f}")
assert second < first / 3

figure, axes = plt.subplots(figsize=(7, 3), num="surprise")
axes.bar(np.arange(1, 2 * HALF), surprise.mean(axis=0))
axes.axvline(HALF - 0.5, color="black", linestyle=":")
axes.set(xlabel="token", ylabel="surprise", title="the same 25 tokens, twice")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Two kinds of heads
#
# A **previous-token** head looks, at every token, at the one before. An **induction** head looks at the token that came
# *after* the last time that the present one was there: in "Mrs Qu|ib|bleworth ... Mrs Qu" it looks from the second "Qu"
# at "ib", and what it finds there is what comes next. In our texts this is the token 24 places back. For each head we
# take the mean share that it gives to that place.

# %%


def scores(pattern):
    """How much each head looks one token back, and at what came after the same token before: [L, N] each."""
    previous = np.diagonal(pattern, -1, axis1=3, axis2=4).mean(axis=(1, 3))
    induction = np.diagonal(pattern, 1 - HALF, axis1=3, axis2=4)[..., 1:].mean(axis=(1, 3))
    return previous, induction


def highest(score, count):
    """(layer, head) of the heads with the highest scores."""
    return [(int(i) // N, int(i) % N) for i in np.argsort(-score, axis=None)[:count]]


previous, induction = scores(pattern)
for name, score in (("previous token", previous), ("induction", induction)):
    print(name, [(layer, head, round(float(score[layer, head]), 2)) for layer, head in highest(score, 6)])
library = inspection.head_scores(config, params, tokens)  # the same, for texts of any kind
np.testing.assert_allclose(previous, library.previous, atol=1e-2)
np.testing.assert_allclose(induction, library.induction, atol=1e-2)
assert highest(previous, 1) == [(16, 0)]
assert highest(induction, 1) == [(18, 6)]

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 4.6), width_ratios=(1, 1, 2), num="heads")
for axes, score, title in ((left, previous, "previous token"), (middle, induction, "induction")):
    axes.imshow(score, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(N), xlabel="head", ylabel="layer", title=title)
right.imshow(pattern[18, 0, 6], cmap="Blues", vmin=0, vmax=1)
right.set(xlabel="is looked at", ylabel="looks", title="layer 18, head 6, on one of the texts")
figure.tight_layout()
plt.show()

# %% [markdown]
# On the right is the best induction head. While the text is new it rests on the first token. As soon as the text comes
# again, it walks along the first copy, one token ahead.
#
# In the story it looks where it should, too:

# %%
words = [tokenizer.decode([token]) for token in story]
looks = np.asarray(inspection.run(config, params, [story], ["attn.pattern"], layers=[18], heads=[6])["attn.pattern"])
looks = looks[0, 0, 0, -1]
print(f"from the last {words[-1]!r} it looks at {words[looks.argmax()]!r} with {looks.max():.2f}")
assert words[looks.argmax()] == "ib"

# %% [markdown]
# ## They work in pairs
#
# How does a head know what came *after* an earlier "Qu"? It has to find "ib", and "ib" knows only itself. Unless a head
# in an earlier layer looks one back, and leaves a note at "ib": "before me was Qu". If that is so, the induction heads
# must go blind without it. We switch off the best previous-token head, which is in layer 16, just before them; and for
# comparison the second best, in layer 11.


# %%
def without(heads):
    """Edits that silence some heads: what they hand over becomes 0."""
    return [inspection.zero(config, "attn.z", layers=[layer], heads=[head]) for layer, head in heads]


blind = {}
for layer, head in highest(previous, 2):
    pattern_without, surprise_without = look(without([(layer, head)]))
    blind[layer, head] = scores(pattern_without)[1]
    left_over = [round(float(blind[layer, head][each]), 2) for each in highest(induction, 4)]
    print(
        f"without head {head} of layer {layer}: induction {left_over}, surprise {surprise_without[:, HALF:].mean():.1f}"
    )

assert blind[16, 0][18, 6] < 0.5 * induction[18, 6]
assert blind[11, 1][18, 6] > 0.9 * induction[18, 6]

# %% [markdown]
# So the two look alike, but only the head of layer 16 leaves the note. This pair of heads is the *induction circuit*
# (Olsson and others, 2022, arXiv:2209.11895), and nearly every language model has grown one.
#
# ## Without the heads that copy
#
# We silence more and more induction heads, and as many others, chosen by chance.

# %%
counts = (0, 1, 2, 4, 8)
chance = [divmod(int(i), N) for i in np.random.default_rng(1).choice(L * N, size=8, replace=False)]
copying = [look(without(highest(induction, count)))[1] for count in counts]
others = [look(without(chance[:count]))[1] for count in counts]

figure, axes = plt.subplots(figsize=(6, 3.2), num="silenced")
axes.plot(counts, [each[:, HALF:].mean() for each in copying], "o-", label="induction heads")
axes.plot(counts, [each[:, HALF:].mean() for each in others], "o-", label="heads chosen by chance")
axes.axhline(first, color="black", linestyle=":", label="first time")
axes.set(xlabel="heads silenced", ylabel="surprise, second time")
axes.legend()
figure.tight_layout()
plt.show()

print("the story, without 8 induction heads:", says(story, without(highest(induction, 8))))
lost = (copying[-1][:, HALF:].mean() - second) / (first - second)
print(f"of what copying saves, {lost:.0%} is lost")
assert 0.7 < lost < 0.85
assert others[-1][:, HALF:].mean() < 1.2 * second
assert abs(copying[-1][:, : HALF - 1].mean() - first) < 0.5  # what is new is read as before
assert says(story, without(highest(induction, 8)))["ib"] < 0.5

# %% [markdown]
# Eight heads of 270 do three quarters of this model's copying. What is new to it, it reads as well as before.
