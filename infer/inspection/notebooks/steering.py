# %% [markdown]
# # Steering: push the model's mood
#
# Between two layers, a word is 576 numbers: a point in a space, if you like. Are there directions in it that mean
# something? Take what the model has at the end of happy sentences, and take off what it has at the end of sad ones. The
# difference is a direction. Then let the model write, and add that direction to every word on its way through one
# layer. Nothing is trained.

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection
from phi3_jax.infer import Options, generate

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
    ("A great day", "A bad day"),
    ("The best film", "The worst film"),
    ("She felt happy", "She felt angry"),
]
good, bad = ([tokenizer.encode(text) for text in texts] for texts in zip(*pairs, strict=True))  # [5, 3] each
streams = [
    np.asarray(inspection.run(config, params, texts, ["resid_post"], layers=[LAYER], positions=[-1])["resid_post"])
    for texts in (good, bad)
]
differences = (streams[0] - streams[1])[0, :, 0]  # [5, D]
unit = differences / np.linalg.norm(differences, axis=1, keepdims=True)
print("cosines of the five differences with one another:")
print((unit @ unit.T).round(2))

# %% [markdown]
# The five differences have something in common: by chance, cosines of 576 numbers would be about 0 ± 0.04. So we take
# their mean. `steering_vector` does the same, and makes an edit of it, which adds it to every word after layer 16.

# %%
assert (unit @ unit.T)[np.triu_indices(5, 1)].mean() > 0.1

steering = inspection.steering_vector(config, params, good, bad, LAYER, positions=(-1,))
direction = np.asarray(steering.value).reshape(-1)
np.testing.assert_allclose(direction, differences.mean(axis=0), atol=1e-3)
print(f"the direction is {np.linalg.norm(direction):.0f} long, a word about {np.linalg.norm(streams[0][0, 0, 0]):.0f}")

# %% [markdown]
# ## Before and after
#
# `Options(edits=...)` lets `generate` write with edits in force: they are made while the text is read, and at every new
# word. The strength is data, so that all strengths are one program.


# %%
def steered(strength):
    """The edit, so many times as strong."""
    return dataclasses.replace(steering, value=strength * steering.value)


FILM = "I went to see the film, and I thought it was"
texts = [FILM, "Today I feel"]
answers = {}
for strength in (-1, 0, 1):
    results = generate(checkpoint, texts, max_new_tokens=18, options=Options(edits=(steered(strength),)))
    answers[strength] = [result.text for result in results]
    for text, answer in zip(texts, answers[strength], strict=True):
        print(f"{strength:+}  {text} ...{answer!r}")

# %% [markdown]
# Strength 0 is what the model writes anyway:

# %%
assert answers[0] == [result.text for result in generate(checkpoint, texts, max_new_tokens=18)]
assert all(len({answers[strength][i] for strength in answers}) == 3 for i in range(len(texts)))

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
    film = [tokenizer.encode(FILM)]
    logits = inspection.run(config, params, film, positions=[-1], edits=[steered(strength)])["logits"][0, 0]
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
assert blame.max() > 10 * blame[middle]

# %% [markdown]
# Too much of it and the model falls apart: the stream is pushed to where no word has ever been, and neither praise nor
# blame makes sense there.

# %%
print(f"+6  {generate(checkpoint, texts, max_new_tokens=18, options=Options(edits=(steered(6),)))[0].text!r}")
assert praise[-1] < praise.max() / 3
