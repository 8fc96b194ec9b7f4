"""Applies a plan to a model, as forward hooks on its modules.

- `apply`: applies and removes a plan. `plan_entry` makes the hooks of one entry, by the table in `plan_words`; `words`
  has a file for each kind of hook, which `arguments` places on a module. `submodules` and `find_argument` find the
  module and the argument that an entry names.
- `attention_modules`, `new_attention` and `within`: find attention that a plan does not cover.
- `copies`: copies of a split model are not split. `dynamic_sizes`: all ranks compile the same graphs.
- `diffusers_hooks`: diffusers' own hooks (caches, guidance) in a split model. Only this folder imports diffusers.
"""
