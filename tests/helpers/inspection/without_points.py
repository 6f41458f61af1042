"""The points of the decoder (phi3_jax/model/points.py) as pass-throughs, to compare programs with."""


class Bare:
    """In place of a `Tap`."""

    wants_heads = wants_weights = False

    def __init__(self, *_):
        self.kept = {}

    def __call__(self, name, value):
        return value

    def wants(self, *names):
        return False

    changes = wants
