"""`python -m diffusers_attn`: the command `diffusers-attn`."""

from .cli.main import main

if __name__ == "__main__":
    main()
