"""All readers, by name."""

from ..reader import Reader
from . import caches, checkpoints, texts, tokenizers, training

READERS: dict[str, Reader] = {
    **checkpoints.READERS,
    **tokenizers.READERS,
    **texts.READERS,
    **training.READERS,
    **caches.READERS,
}
