"""What `distill` learns from, and which of it each step sees.

`examples` one picture with its text, `sources` every form they come in, `pictures` what training gets of them,
`sampler` the order.
"""

from .examples import Dataset, Example
from .pictures import Pictures, bucket_sizes, collate
from .sampler import ResumableBatchSampler
from .sources import read

__all__ = ["Dataset", "Example", "Pictures", "ResumableBatchSampler", "bucket_sizes", "collate", "read"]
