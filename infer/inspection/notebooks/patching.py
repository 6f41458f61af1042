# %% [markdown]
# # Patching: France becomes Italy, in one place
#
# "The capital of France is" makes the model say " Paris", "The capital of Italy is" " Rome". Somewhere on the way from
# the first to the last word, the country becomes the city. Where?
#
# *Activation patching* finds out. We let the model read the text about France, but at **one** layer and **one** word we
# replace what it has there, the 576 numbers of the residual stream, by what it had at the same place when it read of
# Italy. If it then says " Rome", what matters was in that place. We do this for every layer and every word.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection

checkpoint = phi3_jax.load("demo")
config, params, tokenizer = checkpoint.config, checkpoint.params, checkpoint.tokenizer
L, N = config.num_hidden_layers, config.num_attention_heads

france = tokenizer.encode("The capital of France is")
italy = tokenizer.encode("The capital of Italy is")
assert len(france) == len(italy)  # so that each word has its counterpart
words = [tokenizer.decode([token]) for token in france]
COUNTRY, LAST = words.index(" France"), len(words) - 1
(paris,), (rome,) = tokenizer.encode(" Paris"), tokenizer.encode(" Rome")


def says(tokens, edits=()):
    """The most likely next tokens, and their probabilities."""
    logits = inspection.run(config, params, [tokens], positions=[-1], edits=edits)["logits"][0, 0]
    probabilities = np.asarray(jax.nn.softmax(logits))
    return {tokenizer.decode([int(i)]): round(float(probabilities[i]), 2) for i in np.argsort(-probabilities)[:4]}


print("France:", says(france))
print("Italy: ", says(italy))

# %% [markdown]
# ## One patch
#
# We keep what Italy's run had after each layer (`resid_post`), and put it into France's run, at one place: first at the
# country, then at the last word, after layer 10. An edit is data: which point, where, and what is put there.

# %%
kept = inspection.run(config, params, [italy], ["resid_post", "attn.z"])


def patch(layer, position):
    """France's stream after one layer, at one word, replaced by Italy's."""
    value = kept["resid_post"][:, :, position : position + 1]  # [L, 1, 1, D]
    return inspection.replace(config, "resid_post", value, layers=[layer], positions=[position])


print("at the country: ", says(france, [patch(10, COUNTRY)]))
print("at the last word:", says(france, [patch(10, LAST)]))

# %% [markdown]
# ## All of them
#
# Thirty layers and five words are 150 runs. `patch_sweep` makes all of them in one compiled program, and computes only
# what a patch can change: the layers and words behind it. Of each run we keep how much the model prefers " Rome" to
# " Paris": the difference of their logits, above 0 if it is Rome.

# %%
prefers = inspection.logit_difference(rome, paris)
difference = np.asarray(inspection.patch_sweep(config, params, [france], [italy], prefers, point="resid_post"))
print(difference.shape)  # [L, T]

one = inspection.run(config, params, [france], positions=[-1], edits=[patch(10, COUNTRY)])["logits"][0, 0]
np.testing.assert_allclose(difference[10, COUNTRY], one[rome] - one[paris], atol=1e-2)
assert (np.delete(difference, [COUNTRY, LAST], axis=1) < -5).all()  # other words do not matter

figure, axes = plt.subplots(figsize=(8.5, 3.1), num="patching")
most = np.abs(difference).max()
image = axes.imshow(difference.T, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
axes.set(yticks=range(len(words)), yticklabels=words, xlabel="after layer", title="France's stream replaced by Italy's")
figure.colorbar(image, label="← Paris      Rome →")
figure.tight_layout()
plt.show()

# %% [markdown]
# The picture has two stripes and one step. Up to layer 22 everything is at the country: replaced there, the model says
# Rome, and the last word does not matter. From layer 23 on it is the other way round. So this model keeps the country
# at the country's place for 23 layers, and moves what is asked of it to the last word **in one layer**. A larger model
# is rarely so tidy: there the step is spread over several layers.

# %%
moves = int(np.argmax(difference[:, LAST] > 0))
print(f"after layer {moves} the answer is at the last word")
assert moves == 23
assert (difference[:moves, COUNTRY] > 0).all()
assert (difference[moves:, COUNTRY] < 0).all()
assert (difference[moves:, LAST] > 0).all()

# %% [markdown]
# ## The head that carries it
#
# Only attention moves anything from word to word. Which of the 270 heads does? We replace what a single head hands
# to the last word (`attn.z`, its 64 numbers).

# %%
by_head = inspection.patch_sweep(
    config, params, [france], [italy], prefers, point="attn.z", positions=[LAST], heads=None
)
by_head = np.asarray(by_head)[:, 0]  # [L, N]
layer, head = np.unravel_index(by_head.argmax(), (L, N))
print(f"layer {layer}, head {head}: {by_head[layer, head]:.1f}; the next best {np.sort(by_head, axis=None)[-2]:.1f}")
assert (layer, head) == (moves, 4)
assert by_head[layer, head] > 0 > np.sort(by_head, axis=None)[-2]

figure, axes = plt.subplots(figsize=(8.5, 3.1), num="patching_heads")
image = axes.imshow(by_head.T, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
axes.set(yticks=range(N), ylabel="head", xlabel="layer", title="what one head hands to the last word, replaced")
figure.colorbar(image, label="← Paris      Rome →")
figure.tight_layout()
plt.show()

# %% [markdown]
# Head 4 alone turns the answer: 64 of the 17,280 numbers that all heads together hand to the last word. It is
# the head that looks at the country (0.90, as the first walk shows). It does the same for other countries:

# %%
for country, other, expected in (
    ("Germany", "Italy", " Rome"),
    ("Japan", "China", " Beijing"),
    ("France", "Spain", " Madrid"),
):
    text, donor = (tokenizer.encode(f"The capital of {name} is") for name in (country, other))
    z = inspection.run(config, params, [donor], ["attn.z"])["attn.z"][:, :, -1:]
    edit = inspection.replace(config, "attn.z", z, layers=[moves], positions=[len(text) - 1], heads=[4])
    print(f"{country} {says(text)} becomes {says(text, [edit])}")
    assert next(iter(says(text, [edit]))) == expected

# %% [markdown]
# ## What it does not show
#
# Without the head the model knows less, but not nothing: Paris stays the first of its answers, with far less
# probability. Other heads know it, too, and the name of a capital that is often in texts needs no country.

# %%
without = says(france, [inspection.zero(config, "attn.z", layers=[moves], heads=[4])])
print("without the head:", without)
assert next(iter(without)) == " Paris"
assert without[" Paris"] < 0.2
