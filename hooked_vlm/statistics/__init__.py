"""What may be said of values over samples. Samples are the unit, never cells.

Arrays have samples first and any axes of cells after them; NaN is left out, cell by cell. :func:`summarize` says it all
of a labelled result.
"""

from hooked_vlm.statistics.estimates import Estimates, estimate, paired
from hooked_vlm.statistics.halves import MapAgreement, map_agreement, spearman_brown, split_half
from hooked_vlm.statistics.intervals import Interval, bootstrap
from hooked_vlm.statistics.permutation import Permuted, label_test, sign_flip_test
from hooked_vlm.statistics.ranks import auroc, auroc_interval, rank_correlation
from hooked_vlm.statistics.summary import summarize
from hooked_vlm.statistics.table import to_rows, write_table

__all__ = [
    "Estimates",
    "Interval",
    "MapAgreement",
    "Permuted",
    "auroc",
    "auroc_interval",
    "bootstrap",
    "estimate",
    "label_test",
    "map_agreement",
    "paired",
    "rank_correlation",
    "sign_flip_test",
    "spearman_brown",
    "split_half",
    "summarize",
    "to_rows",
    "write_table",
]
