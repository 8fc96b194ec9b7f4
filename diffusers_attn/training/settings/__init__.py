"""The settings of a training run: what they are, and the places that a user writes them in.

- `config` has all settings: those of the `groups`, checked for `contradictions`. `setting` declares one; `bounds` and
  `choices` are the values that it accepts. `datasets` has the settings of each of several sets of data, and `previews`
  those of each sample; `entries` reads lists of them.
- They come from a command line (`arguments`), a `run_file`, and a recipe (`recipes`, of the folder `recipe_files`).
  `flag_names` writes a setting as an option, for messages.
"""
