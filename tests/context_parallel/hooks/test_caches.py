"""Caches from one forward to the next, over ranks: the results of one process."""

import pytest
import torch

from diffusers_attn import disable_context_parallel, enable_context_parallel

from ...parallelize.test_enable import build, error, inputs, output


def prompts_in_turn(meshes, mode):
    """The worst error of a model that keeps keys of prompts, and whether it computed them once for each prompt.

    A positive and a negative prompt, step by step: tensors of their own, then views that are made anew for every call,
    then tensors without a count of their changes.
    """
    from diffusers import TextKVCacheConfig

    ways = {
        "tensors": lambda prompt: prompt,
        "views": lambda prompt: prompt[:],
        "in inference mode": lambda prompt: prompt,
    }
    model = build("nucleus_moe")
    given = inputs("nucleus_moe")
    found, prompts_in_use, computed = {}, [], []
    for where in ("one process", "ranks"):
        if where == "ranks":
            enable_context_parallel(model, mesh=meshes.lines[2], inputs=mode, verbose=False)
        model.enable_cache(TextKVCacheConfig())
        count = model.transformer_blocks[0].encoder_proj.register_forward_hook(lambda *_: computed.append(1))
        for way, view in ways.items():
            mode_ = torch.inference_mode() if "inference" in way else torch.no_grad()
            with mode_:
                text = given["encoder_hidden_states"].clone()
                prompts = [text, text.flip(-1) * 2]
                prompts_in_use.append(
                    prompts
                )  # the cache takes a prompt at the address of one that is gone for that one
                computed.clear()
                outs = []
                for step in range(3):
                    for prompt in prompts:
                        now = given | {
                            "encoder_hidden_states": view(prompt),
                            "hidden_states": given["hidden_states"] * (1 + step),
                        }
                        outs.append(output(model, now).clone())
                found[where, way] = outs, len(computed)
        count.remove()
        model.disable_cache()
    disable_context_parallel(model)
    worst = max(
        error(a, b) for way in ways for a, b in zip(found["ranks", way][0], found["one process", way][0], strict=True)
    )
    return worst, [found["ranks", way][1] for way in ways], [found["one process", way][1] for way in ways]


@pytest.mark.parametrize("mode", ["broadcast", "check", "trust"])
def test_keys_of_the_prompt_are_those_of_the_prompt(pool, mode):
    for worst, computed, alone in pool.run(2, prompts_in_turn, mode=mode):
        assert worst < 1e-5
        assert computed == alone == [2, 2, 2]
