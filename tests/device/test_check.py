"""`make check-device`, rehearsed on the CPU with a tiny model; and that it tells a wrong kernel."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def device_scripts(monkeypatch):
    """The modules of this folder, which import one another by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    for name in ("contracts", "models"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["a product", "gated", "attention", "new tokens"])
def test_a_wrong_kernel_is_told(device_scripts, monkeypatch, mistake):
    import contracts

    kept = {name: getattr(contracts, name) for name in ("linear", "gated", "attention")}
    attend = contracts.KVCache.attend
    if mistake == "a product":  # one input of 384 is left out
        monkeypatch.setattr(contracts, "linear", lambda x, *a, **k: kept["linear"](x.at[:, 57].set(0), *a, **k))
    elif mistake == "gated":  # one input of 352 is wrong
        monkeypatch.setattr(contracts, "gated", lambda x, *a: kept["gated"](x.at[:, 57].add(1), *a))
    elif mistake == "new tokens":  # one number of a head is rotated by another angle

        def turned(cache, layer, qkv, cos, sin, seen, kernels):
            return attend(cache, layer, qkv, cos.at[..., 7].multiply(-1) if kernels else cos, sin, seen, kernels)

        monkeypatch.setattr(contracts.KVCache, "attend", turned)
    else:  # the newest key is not seen

        def wrong(q, kv, seen):
            return kept["attention"](q, kv, dataclasses.replace(seen, q_positions=seen.q_positions - 1))

        monkeypatch.setattr(contracts, "attention", wrong)
    for kind in ("linear", "gated", "attention", "new_token"):
        cases = itertools.islice(getattr(contracts, f"_{kind}_cases")(True), 2)
        is_wrong = [not error <= 1 for _, error in cases]
        is_meant = kind == {"a product": "linear", "new tokens": "new_token"}.get(mistake, mistake)
        assert all(is_wrong) if is_meant else not any(is_wrong)


def test_a_kernel_whose_threads_race_is_told(device_scripts):
    import contracts

    results = iter([*[np.ones(3)] * 7, np.nextafter(np.ones(3), 2)])
    assert np.isnan(contracts._always(lambda: next(results))).all()
    assert (contracts._always(lambda: np.ones(3)) == 1).all()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = ["make", "check-device", "DEVICE_FLAGS=--rehearse", f"DEVICE_JSON={tmp_path / 'found.json'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, f"DEVICE_PYTHON={sys.executable}"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == 0
    assert found["contract linear"]["cases"] > 10
    for name in ("int4 decode, batch 8, context 24", "int4 prefill 48", "LoRA step, int4, 64 tokens"):
        assert found[name]["tokens/s"] > 0, name
