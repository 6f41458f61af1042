"""The data of training runs: JSON lines -> texts in token ids -> rows -> batches."""

from .dataset import Dataset as Dataset
from .dataset import Report as Report
from .order import batches as batches
from .order import eval_batches as eval_batches
from .prepare import prepare as prepare
