"""From the examples of `data` to the batches of a run, with the pipeline's own encoders.

- `prepare` encodes the examples that are not in the cache, and makes the loader; `buckets` has the sizes, and
  `captions` encodes the texts.
- `noise` adds noise levels and random tensors to a batch.
- `largest` replaces encoding in a dry run: it encodes one example, of the largest size.
"""
