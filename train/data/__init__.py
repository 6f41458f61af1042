"""The data of training runs: JSON lines -> texts in token ids -> rows -> batches.

examples.py reads a line, prepare.py writes a whole file as arrays that dataset.py maps (packing.py puts several texts
into a row), and order.py says which rows make a step. Other packages use the names below.
"""

from .batch import Batch as Batch
from .batch import Pair as Pair
from .dataset import Dataset as Dataset
from .dataset import Report as Report
from .examples import Text as Text
from .examples import read_line as read_line
from .order import batches as batches
from .order import eval_batches as eval_batches
from .prepare import prepare as prepare
