"""Many files on a cluster of Ray: three machines, played by this one, of which one is lost in the middle."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
from generate_program import in_process
from spoiled import with_bytes

import phi3_jax
from phi3_jax.infer import generate

pytest.importorskip("ray.data", reason="ray is not installed: make test-ray")
pytestmark = pytest.mark.slow
