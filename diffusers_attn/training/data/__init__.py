"""Training data: from a folder or a Hugging Face dataset to batches of latents and text embeddings.

examples = read_examples("photographs/", on_bad_data="skip")
latents = LatentCache("cache/", settings, Buckets.of(512 * 512)).fill(examples, encode, ranks=ranks)
captions = [caption for each in examples for caption in each.captions]
text = TextCache("cache/", settings).fill(captions, encode_text, ranks=ranks)
sampler = LatentLoader.sampler_for(latents, global_batch_size=8, seed=0)
for batch in LatentLoader(latents, text, sampler, Share(dp_rank, dp_size, micro_batch_size=1)):
    ...

1. `examples`: finds files (`walk`, `source`) or `rows` of a dataset with their `captions`, `conditions` and `masks`;
   `tags` changes captions, `clips` makes several examples of a video; `digests` and `integrity` detect changed and
   damaged files.
2. `latent_cache` and `text_cache`: encode them once, with `encoding` in common. `pixels`, with `decode`, `frames`,
   `buckets` and `resize_crop`, are what encoders get, and the `sound` of videos if a model learns it; `store`, `disk`
   and `lock` keep the results; `ranks` and `prefetch` divide the work.
3. `loader`: batches for the steps, chosen by `sampler` and made by `collate`.

`errors` collects problems with the data and reports them together.
"""

from .buckets import Bucket, Buckets
from .decode import MissingDecoderError
from .errors import Problem, TrainingDataError
from .examples import Example, read_dataset, read_examples, read_folder
from .frames import FramePicking
from .latent_cache import CachedLatents, LatentCache
from .loader import LatentLoader
from .ranks import GroupRanks, OneRank, OtherRankError, Ranks
from .sampler import BatchSampler, Share, Step
from .text_cache import TextCache

__all__ = [
    "BatchSampler",
    "Bucket",
    "Buckets",
    "CachedLatents",
    "Example",
    "FramePicking",
    "GroupRanks",
    "LatentCache",
    "LatentLoader",
    "MissingDecoderError",
    "OneRank",
    "OtherRankError",
    "Problem",
    "Ranks",
    "Share",
    "Step",
    "TextCache",
    "TrainingDataError",
    "read_dataset",
    "read_examples",
    "read_folder",
]
