# %% [markdown]
# # Steering: push the model's mood
#
# Between two layers, a word is 576 numbers: a point in a space, if you like. Are there directions in it that mean
# something? Take what the model has at the end of happy sentences, and take off what it has at the end of sad ones. The
# difference is a direction. Then let the model write, and add that direction to every word on its way through one
# layer. Nothing is trained.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection

checkpoint = phi3_jax.load("demo")
config, params, tokenizer = checkpoint.config, checkpoint.params, checkpoint.tokenizer
LAYER = 16  # about the middle: words have been understood there, and the answer is not chosen yet

# %% [markdown]
# ## The direction
#
# Five pairs of sentences that differ in their mood and little else. We read the residual stream of the last word.

# %%
pairs = [
    ("I love this", "I hate this"),
    ("This is wonderful", "This is terrible"),
    ("What a great day", "What a bad day"),
    ("She was happy and kind", "She was angry and cruel"),
    ("It was the best film", "It was the worst film"),
]


def last_word(text):
    """The residual stream of a text's last word after LAYER, float [D]."""
    tokens = tokenizer.encode(text)
    seen = inspection.run(config, params, [tokens], ["resid_post"], layers=[LAYER], positions=[-1])
    return np.asarray(seen["resid_post"])[0, 0, 0]


differences = np.stack([last_word(good) - last_word(bad) for good, bad in pairs])
direction = differences.mean(axis=0)
unit = differences / np.linalg.norm(differences, axis=1, keepdims=True)
print("cosines of the five differences with one another:")
print((unit @ unit.T).round(2))
print(
    f"the direction is {np.linalg.norm(direction):.0f} long, a word about {np.linalg.norm(last_word(pairs[0][0])):.0f}"
)

# %% [markdown]
# The five differences have something in common: chance would give cosines of about 0 ± 0.04 in 576 dimensions.

# %%
assert (unit @ unit.T)[np.triu_indices(5, 1)].mean() > 0.1

# %% [markdown]
# ## Before and after
#
# `add` is an edit: the direction, times a strength, is added to every word after layer 16. With a cache the model reads
# only the new token in each step, and the edit is made there, too. The strength is data, so all of this is one program
# for the text and one for a new token.


# %%
def write(text, strength, count=18):
    """What the model writes after a text, greedily, steered."""
    edit = inspection.add(config, "resid_post", strength * direction, layers=[LAYER])
    cache = phi3_jax.KVCache.create(config, batch=1, capacity=64)
    new, written = tokenizer.encode(text), []
    for _ in range(count):
        seen, cache = inspection.run(config, params, [new], positions=[-1], edits=[edit], cache=cache)
        new = [int(seen["logits"][0, 0].argmax())]
        written += new
    return tokenizer.decode(written)


FILM = "I went to see the film, and I thought it was"
texts = (FILM, "Today I feel")
answers = {(text, strength): write(text, strength) for text in texts for strength in (-1, 0, 1)}
for (text, strength), answer in answers.items():
    print(f"{strength:+}  {text} ...{answer!r}")

# %% [markdown]
# Without steering it is what the model writes anyway:

# %%
plain = phi3_jax.infer.generate(checkpoint, [FILM], max_new_tokens=18)[0].text
assert answers[FILM, 0] == plain
assert len({answers[FILM, strength] for strength in (-1, 0, 1)}) == 3

# %% [markdown]
# ## How strong?
#
# We watch the next word after "I thought it was": how probable are some words of praise, and some of blame?

# %%
words = {
    "praise": ["great", "good", "wonderful", "beautiful", "fantastic", "amazing", "excellent", "lovely"],
    "blame": ["bad", "terrible", "awful", "horrible", "boring", "nightmare", "disaster", "mistake"],
}
known = {kind: [tokenizer.encode(f" {word}")[0] for word in each] for kind, each in words.items()}
strengths = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
shares = {kind: [] for kind in known}
for strength in strengths:
    edit = inspection.add(config, "resid_post", strength * direction, layers=[LAYER])
    logits = inspection.run(config, params, [tokenizer.encode(FILM)], positions=[-1], edits=[edit])["logits"][0, 0]
    probabilities = np.asarray(jax.nn.softmax(logits))
    for kind, each in known.items():
        shares[kind].append(probabilities[each].sum())

figure, axes = plt.subplots(figsize=(6.5, 3.4), num="steering")
axes.plot(strengths, shares["praise"], "o-", color="tab:blue", label="great, good, wonderful, ...")
axes.plot(strengths, shares["blame"], "o-", color="tab:red", label="bad, terrible, awful, ...")
axes.set(xlabel="strength", ylabel="probability of the next word", title=f"{FILM} ...")
axes.legend()
figure.tight_layout()
plt.show()

praise, blame = np.array(shares["praise"]), np.array(shares["blame"])
middle = list(strengths).index(0)
print(f"praise {praise[middle]:.3f}, at most {praise.max():.3f} at strength {strengths[praise.argmax()]}")
print(f"blame  {blame[middle]:.3f}, at most {blame.max():.3f} at strength {strengths[blame.argmax()]}")
assert strengths[praise.argmax()] > 0 > strengths[blame.argmax()]
assert praise.max() > 1.5 * praise[middle]
assert blame.max() > 20 * blame[middle]

# %% [markdown]
# Too much of it and the model falls apart: the stream is pushed to where no word has ever been, and neither praise nor
# blame makes sense there.

# %%
print(f"+6  {write(FILM, 6)!r}")
assert praise[-1] < praise.max() / 3
