# %% [markdown]
# # What int4 does
#
# A model's weights may be kept as integers of 4 bits, which takes a seventh of the memory of float32. What is
# lost? We load the same model with floats and as `int4`, and walk through both, layer by layer.
#
# A warning: the demo's file holds integers itself, of 4 to 8 bits, on a finer grid than ours. What is "float" here are
# the exact values of those. Rounding once more, and a model this small, make the loss larger than what one would see
# with a model of some billions of parameters.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import phi3_jax
from phi3_jax import inspection
from phi3_jax.kernels import QuantizedTensor

floats = phi3_jax.load("demo")
integers = {name: phi3_jax.load("demo", quantize=name, layout="rows").params for name in ("int8", "int4")}
config, tokenizer = floats.config, floats.tokenizer
L = config.num_hidden_layers

text = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees."
tokens = tokenizer.encode(text)

# %% [markdown]
# ## Sixteen steps
#
# The inputs of a matrix are cut into groups of 32 weights. Each group has a scale of its own (16 bits), and each weight
# becomes one of 16 steps: 4.5 bits for a weight. `dequantize` makes floats of them again: the weights that the model
# really computes with.


# %%
def is_integers(leaf):
    """Whether a parameter is kept as integers."""
    return isinstance(leaf, QuantizedTensor)


def rounded(params):
    """The same tree with floats in place of the integers, of exactly their values."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_integers(leaf) else leaf, params, is_leaf=is_integers)


int8, int4 = rounded(integers["int8"]), rounded(integers["int4"])
group = np.asarray(floats.params["layers"]["self_attn"]["o_proj"]["weight"][0, 0, :32])
steps = np.asarray(int4["layers"]["self_attn"]["o_proj"]["weight"][0, 0, :32])
print("8 weights:     ", group[:8].round(3))
print("as 4 bits:     ", steps[:8].round(3))
print("steps in use:  ", len(set(steps.tolist())))
assert len(set(steps.tolist())) <= 16

for part in ("self_attn/qkv_proj", "self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj"):
    block, name = part.split("/")
    exact = floats.params["layers"][block][name]["weight"]
    errors = [jnp.linalg.norm(each["layers"][block][name]["weight"] - exact) for each in (int8, int4)]
    shares = [float(error / jnp.linalg.norm(exact)) for error in errors]
    print(f"{part:20} error: int8 {shares[0]:.2%}, int4 {shares[1]:.1%}")
    assert shares[0] < 0.01 < 0.05 < shares[1] < 0.15

# %% [markdown]
# ## Layer by layer
#
# Every weight is a little wrong, and every layer adds to the error of those before. We compare the residual streams
# after each layer. (The first word is left out: it has some enormous numbers, by which heads recognise their resting
# place, and its error would hide those of all others.)


# %%
def run(params, edits=()):
    """The streams [L, T, D] and the log-probabilities [T, V]."""
    seen = inspection.run(config, params, [tokens], ["resid_post", "logits"], edits=edits)
    return np.asarray(seen["resid_post"])[:, 0], np.asarray(jax.nn.log_softmax(seen["logits"][0]))


stream, logs = run(floats.params)
streams = {"int8": run(int8)[0], "int4": run(int4)[0]}
errors = {}  # of the streams after each layer, [L]
for name, other in streams.items():
    of_words = np.linalg.norm(other - stream, axis=-1) / np.linalg.norm(stream, axis=-1)  # [L, T]
    errors[name] = of_words[:, 1:].mean(axis=1)
    print(f"{name}: after the first layer {errors[name][0]:.1%}, after the last {errors[name][-1]:.1%}")

# %% [markdown]
# Are these the values of the model that really computes with integers? They are, within what rounding does: the points
# are read from models of any kind of weights.

# %%
for name, params in integers.items():
    np.testing.assert_allclose(run(params)[0][:, 1:], streams[name][:, 1:], rtol=1e-3, atol=0.1)

# %% [markdown]
# ## What it does to the next word
#
# KL divergence says how far two predictions are apart: 0 if they are the same. We take the mean over the words of the
# text. Besides: how often is the most likely word the same, and how surprised is the model by the text itself?


# %%
def divergence(params, edits=()):
    """The mean over words of KL(floats || these)."""
    other = run(params, edits)[1]
    return float((np.exp(logs) * (logs - other)).sum(axis=-1).mean())


for name, params in {"floats": floats.params, "int8": int8, "int4": int4}.items():
    other = run(params)[1]
    same = (other.argmax(axis=-1) == logs.argmax(axis=-1)).mean()
    surprise = -np.mean([other[i, token] for i, token in enumerate(tokens[1:])])
    print(f"{name:6} KL {divergence(params):.4f}, the same word {same:.0%}, surprise {surprise:.2f}")

assert divergence(int8) < 0.01 < 0.3 < divergence(int4)

# %% [markdown]
# int8 costs next to nothing. int4, done as plainly as this, costs this model a lot.
#
# ## Whose fault is it?
#
# Parameters are a tree, so a model with **some** integers is quickly made. The parts do not add up to the whole, but
# tell which matter: the matrix that leads out of the MLP has a fifth of the weights and much of the loss.

# %%
ours, theirs = floats.params["layers"], int4["layers"]
mixed = {
    "embedding": {**floats.params, "embed_tokens": int4["embed_tokens"]},
    "attention": {**floats.params, "layers": {**ours, "self_attn": theirs["self_attn"]}},
    "MLP, in": {
        **floats.params,
        "layers": {**ours, "mlp": {**ours["mlp"], "gate_up_proj": theirs["mlp"]["gate_up_proj"]}},
    },
    "MLP, out": {**floats.params, "layers": {**ours, "mlp": {**ours["mlp"], "down_proj": theirs["mlp"]["down_proj"]}}},
}
costs = {part: divergence(params) for part, params in mixed.items()}
for part, cost in costs.items():
    print(f"only {part:10} as int4: KL {cost:.3f}")
assert costs["MLP, out"] == max(costs.values())

# %% [markdown]
# That is why `--quantize int4-mixed` keeps the most sensitive matrices at 8 bits.
#
# ## Repair
#
# And in which layers does it happen? Patching tells: we run the int4 model, but after one layer put the streams of the
# float model in place of its own. All errors up to there are then undone, and what is left is the fault of the layers
# behind. Where the curve falls, a layer is undone that cost much.

# %%
left_over = [divergence(int4)]
for layer in range(L):
    edit = inspection.replace(config, "resid_post", stream[:, None], layers=[layer])
    left_over.append(divergence(int4, [edit]))
fall = -np.diff(left_over)
print("the costliest layers:", {int(layer): round(float(fall[layer]), 2) for layer in np.argsort(-fall)[:3]})

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), num="int4")
for name, each in errors.items():
    left.plot(each, "o-", label=name)
left.set(xlabel="layer", ylabel="error of the stream", title="the error grows")
left.legend()
right.plot(range(-1, L), left_over, "o-", color="tab:orange")
right.set(xlabel="layer up to which int4 is undone", ylabel="KL", title="what the layers behind it cost")
figure.tight_layout()
plt.show()

assert left_over[-1] < 0.2 * left_over[0]
assert left_over[L // 2] < left_over[0]
