"""The data of training runs: data sets as published -> texts in token ids -> rows -> batches.

sources.py finds the files, files.py reads their entries, forms.py and messages.py say what these mean, and examples.py
encodes them (truncation.py: what is longer than a row). prepare.py writes a whole data set as arrays that dataset.py
maps (packing.py puts several texts into a row), mixture.py joins several, report.py tells what became of them, and
order.py says which rows make a step. Other packages use the names below.
"""

from .batch import Batch as Batch
from .batch import Pair as Pair
from .dataset import Dataset as Dataset
from .examples import read_record as read_record
from .files import read_entries as read_entries
from .forms import Chat as Chat
from .forms import read_form as read_form
from .mixture import Mixture as Mixture
from .mixture import require_different_files as require_different_files
from .mixture import require_held_out as require_held_out
from .order import batches as batches
from .order import epoch_size as epoch_size
from .order import eval_batches as eval_batches
from .order import rows_of_evaluation as rows_of_evaluation
from .prepare import Part as Part
from .prepare import prepare as prepare
from .report import Report as Report
from .report import Tally as Tally
from .report import counted as counted
from .report import tell as tell
from .sources import find_files as find_files
from .sources import is_data as is_data
from .truncation import Text as Text
