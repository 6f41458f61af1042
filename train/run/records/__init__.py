"""What a run writes while it goes on: metrics, for people and for trackers, and the picture of its losses.

window.py makes the records of steps, metrics.py and tensorboard.py write them, trackers.py hands them to other
programs, and curve.py draws them. Other packages use the names below.
"""

from .curve import require_drawing as require_drawing
from .curve import save_curve as save_curve
from .metrics import MetricsWriter as MetricsWriter
from .metrics import read as read
from .trackers import Trackers as Trackers
from .trackers import open_trackers as open_trackers
from .trackers import require_trackers as require_trackers
from .window import Window as Window
from .window import with_perplexity as with_perplexity
