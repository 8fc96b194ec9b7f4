"""Transfers between ranks: collectives, and memory that the GPUs of one machine share.

- For strategies: `collectives`, and `gather_in_flight` for keys and values; `packed_kv` joins these for collectives.
  `transport` chooses between collectives and `symmetric_gather` once per model, `gather_rows` for other tensors.
- The symmetric gather: `symmetric_memory` (PyTorch's), `copy_plan`, `side_stream`, `gathered_rows` (layout of received
  data) and `gather_operators` (for compiled graphs). Several gathers may be in flight: each has a number, its ticket,
  by which `finish` finds what `start` began.
- Process groups: `group`, `shared_groups` and `process_groups`; `one_thread` lets one thread at a time use a group.
- Exchanges over the hosts: `meetings`, and `everyone`, which sends `plain_values`.
- Errors that name the missing or different rank: `rank_progress`, `activity`, `stalls` and `rank_differences`.
"""
