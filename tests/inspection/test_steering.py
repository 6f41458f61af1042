import numpy as np
import pytest

from phi3_jax import inspection

WITH = np.random.default_rng(1).integers(4, 97, (3, 7))
WITHOUT = np.random.default_rng(2).integers(4, 97, (2, 5))
RAGGED = np.array([[0, 1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, -1, -1, -1]])


@pytest.mark.slow
def test_a_steering_vector_is_a_difference_of_means(tiny, quick_compilation):
    options = {"strength": 2.5, "positions_with": RAGGED}
    edit = inspection.steering_vector(tiny.config, tiny.params, WITH, WITHOUT, -2, at=[3], **options)
    means = []
    for tokens, positions in ((WITH, RAGGED), (WITHOUT, np.tile(np.arange(5), (2, 1)))):
        x = inspection.run(tiny.config, tiny.params, tokens, ["resid_post"], token_positions=positions)["resid_post"][1]
        of_texts = [np.mean([x[b, t] for t in np.flatnonzero(row >= 0)], axis=0) for b, row in enumerate(positions)]
        means.append(np.mean(of_texts, axis=0))
    np.testing.assert_allclose(edit.value.reshape(-1), 2.5 * (means[0] - means[1]), atol=1e-5)
    assert edit.layers.tolist() == [False, True, False]
    plain = inspection.run(tiny.config, tiny.params, WITHOUT, ["resid_post"])["resid_post"]
    steered = inspection.run(tiny.config, tiny.params, WITHOUT, ["resid_post"], edits=[edit])["resid_post"]
    difference = np.asarray(steered - plain)[1]
    np.testing.assert_allclose(difference[:, 3], np.tile(edit.value.reshape(-1), (2, 1)), atol=1e-5)
    np.testing.assert_array_equal(difference[:, [0, 1, 2, 4]], 0)


@pytest.mark.parametrize("point", ["embed", "attn.z", "resid_pst"])
def test_a_point_that_has_no_such_vector_is_refused(tiny, point):
    with pytest.raises(ValueError, match=f"{point} is no vector for each token of a layer"):
        inspection.steering_vector(tiny.config, tiny.params, WITH, WITHOUT, 0, point=point)


@pytest.mark.slow
def test_some_places_alone(tiny, quick_compilation):
    """The last token of each text, wherever it is; a place of padding counts nothing."""
    options = {"positions": np.array([[6, 5], [6, 0], [3, 2]]), "positions_with": RAGGED}
    edit = inspection.steering_vector(tiny.config, tiny.params, WITH, WITH, 0, **options)
    where = {"token_positions": RAGGED}
    own = np.asarray(inspection.run(tiny.config, tiny.params, WITH, ["resid_post"], **where)["resid_post"])[0]
    plain = np.asarray(inspection.run(tiny.config, tiny.params, WITH, ["resid_post"])["resid_post"])[0]
    texts = [own[0, 5:7].mean(axis=0), own[1, 6], own[2, 2:4].mean(axis=0)]
    others = [plain[0, 5:7].mean(axis=0), plain[1, [0, 6]].mean(axis=0), plain[2, 2:4].mean(axis=0)]
    expected = np.mean(texts, axis=0) - np.mean(others, axis=0)
    np.testing.assert_allclose(edit.value.reshape(-1), expected, atol=1e-5)
