"""The model: its frozen weights, and the adapter that is trained.

- Frozen: `pipeline` loads it, with `base_precision` in fewer bits; `offload` keeps blocks in host memory or in files.
- Trained: `lora` adds an adapter to the model and saves it, with `comfyui` by the names that ComfyUI knows;
  `init_adapter` puts a saved one into it. `whole` trains and saves the model's own weights instead. `optim` updates
  what is trained; `ema` averages it. `experts` are two transformers that are trained in one run.
- `peft_casts` leaves out casts of PEFT that change nothing under autocast.
"""
