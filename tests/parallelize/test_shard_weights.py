"""`enable_context_parallel(shard_weights=...)`: the results of one process, with a part of the weights on each rank."""

from __future__ import annotations

import copy
import datetime
import functools
import gc
import json
import weakref

import pytest
import torch

from diffusers_attn import (
    AttentionProviderError,
    apply_compile,
    apply_cuda_graphs,
    cuda_graphs_status,
    disable_context_parallel,
    enable_context_parallel,
)
from diffusers_attn.context_parallel.comm.everyone import everyone
from diffusers_attn.parallelize.weights.select import models_to_shard
from diffusers_attn.parallelize.weights.shard import gather, shard

from .. import tiny_pipelines
from .test_enable import build, error, inputs, output, state, wan_pipeline


def local_share(model):
    """The share of a model's weights that this rank holds."""
    local = sum((each.to_local() if hasattr(each, "to_local") else each).numel() for each in model.parameters())
    return local / sum(each.numel() for each in model.parameters())


def latents(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(
            "a cat", num_inference_steps=2, height=32, width=32, num_frames=5, output_type="latent", generator=generator
        ).frames


def shard_alone(model, meshes):
    """Shards the weights of a model that is not split."""
    agree = functools.partial(everyone, groups=[meshes.lines[2].get_group()])
    chosen = models_to_shard(model, True, "auto")
    shard(model, chosen, "cpu", meshes.lines[2], datetime.timedelta(seconds=100), agree)


def a_pipeline(meshes, options, size):
    """A whole pipeline: what differs from one process, the shares of weights, and what is left after disabling."""
    pipeline = tiny_pipelines.make("wan")
    models = [pipeline.transformer, pipeline.text_encoder]
    expected, before = latents(pipeline), [state(model) for model in models]
    values = [copy.deepcopy(model.state_dict()) for model in models]
    found = []
    for degrees in options:
        mesh = None if size == 4 else meshes.lines[size]
        report = enable_context_parallel(pipeline, shard_weights=True, mesh=mesh, verbose=False, **degrees)
        shares = [local_share(model) for model in models]
        wrong = error(latents(pipeline), expected)
        order = pipeline.transformer._get_fsdp_state()._comm_ctx.post_forward_order
        assert not order  # FSDP2 keeps it for a backward, and it would grow with every step
        line = str(report)
        disable_context_parallel(pipeline)
        restored = [state(model) for model in models] == before and all(
            torch.equal(now, then) for model, old in zip(models, values) for now, then in zip(
                model.state_dict().values(), old.values())
        )  # fmt: skip
        found.append((wrong, shares, line, restored, torch.equal(latents(pipeline), expected)))
    return found


@pytest.mark.parametrize(
    "ranks, options", [(2, [{}]), (4, [{"ulysses_degree": 4}, {"ring_degree": 2, "ulysses_degree": 2}])]
)
def test_a_pipeline_and_its_text_encoder(pool, ranks, options):
    for answers in pool.run(ranks, a_pipeline, options=options, size=ranks):
        for wrong, shares, line, restored, same in answers:
            assert wrong < 1e-5 and restored and same
            assert shares == pytest.approx([1 / ranks] * 2, rel=0.03)
            assert f"; weights of text_encoder, transformer in 1/{ranks} per rank" in line


def shapes_of_models(meshes, names):
    """Models in float64 by name, and a pipeline with two: what differs from one process."""
    answers = {}
    for name in names:
        model = build(name)
        expected = output(model, inputs(name)).detach()
        enable_context_parallel(model, shard_weights=True, mesh=meshes.lines[2], verbose=False)
        share = local_share(model)
        with torch.inference_mode():
            found = output(model, inputs(name, torch.distributed.get_rank()))
        disable_context_parallel(model)
        answers[name] = error(found, expected), share
    models = [build("wan"), build("wan", seed=1)]
    expected = [output(model, inputs("wan")).detach() for model in models]
    pipeline = wan_pipeline(*models)
    report = enable_context_parallel(pipeline, shard_weights=("transformer_2",), mesh=meshes.lines[2], verbose=False)
    shares = [local_share(model) for model in models]
    wrong = max(error(output(model, inputs("wan")).detach(), each) for model, each in zip(models, expected))
    disable_context_parallel(pipeline.transformer_2)
    alone = [local_share(model) for model in models]
    disable_context_parallel(pipeline)
    return answers, shares, alone, wrong, report.sharded_weights


def test_models_in_float64_and_one_of_two_transformers(pool):
    names = ["flux", "qwenimage", "sd3", "hunyuan_video"]
    for answers, shares, alone, wrong, sharded in pool.run(2, shapes_of_models, names=names):
        for name, (model_wrong, share) in answers.items():
            assert model_wrong < 1e-10, name
            assert share == pytest.approx(0.5, rel=0.05), name
        assert shares == [1.0, pytest.approx(0.5, rel=0.05)] and alone == [1.0, 1.0]
        assert wrong < 1e-6 and sharded == ("transformer_2",)


def text_encoders(meshes):
    """Outputs of transformers' models, of parts that are called by themselves, and generated tokens: what differs."""
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llm = sizes | {"num_key_value_heads": 2}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    tied = transformers.Qwen3Config(**llm, head_dim=8, tie_word_embeddings=True)
    qwen = transformers.Qwen2_5_VLConfig(text_config=llm | {"rope_scaling": rope}, vision_config=vision)
    models = {
        "CLIP": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes, projection_dim=16)),
        "tied": transformers.Qwen3ForCausalLM(tied),
        "Qwen-Image": transformers.Qwen2_5_VLForConditionalGeneration(qwen),
    }
    ids = torch.arange(1, 8)[None]
    answers = {}

    @torch.no_grad()
    def results(model):
        found = [*model(input_ids=ids, output_hidden_states=True).hidden_states, model.get_input_embeddings()(ids)]
        if hasattr(model, "lm_head"):
            found.append(model.generate(ids, max_new_tokens=4, do_sample=False).float())
        return found

    for name, model in models.items():
        expected = results(model.eval())
        shard_alone(model, meshes)
        share = local_share(model)
        found = results(model)
        gather([model])
        answers[name] = share, max(error(one, other) for one, other in zip(found, expected))
    return answers


def test_text_encoders(pool):
    for answers in pool.run(2, text_encoders):
        for name, (share, wrong) in answers.items():
            assert share == pytest.approx(0.5, rel=0.02) and wrong < 1e-5, name


def compiled(meshes):
    """Blocks compiled before and after: what differs from one process, and the number of graphs."""
    from torch._dynamo.testing import CompileCounter

    rank = torch.distributed.get_rank()
    model = build("wan", num_layers=3)
    expected = output(model, inputs("wan")).detach()
    answers = []
    for before in (True, False):
        counter = CompileCounter()
        torch._dynamo.reset()
        if before:
            apply_compile(model, backend=counter)
        enable_context_parallel(model, shard_weights=True, mesh=meshes.lines[2], verbose=False)
        if not before:
            apply_compile(model, backend=counter)
        with torch.no_grad():
            answers.append((error(output(model, inputs("wan", rank)), expected), counter.frame_count))
        disable_context_parallel(model)
    return answers


def test_compiled_blocks_share_a_graph(pool):
    for answers in pool.run(2, compiled):
        for wrong, graphs in answers:
            assert wrong < 1e-6
            assert graphs == 2  # as without shards: the first of three blocks splits the sequence, the others share one


def from_files(meshes, folder):
    """A pipeline whose models are on the meta device, with its path."""
    from diffusers import WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    rank = torch.distributed.get_rank()
    unsharded = WanPipeline.from_pretrained(folder)
    expected = latents(unsharded)
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(
            WanTransformer3DModel.load_config(folder, subfolder="transformer")
        )
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(folder, subfolder="text_encoder"))
    pipeline = WanPipeline.from_pretrained(folder, transformer=transformer, text_encoder=text_encoder)
    opened = []
    before = WanTransformer3DModel.from_pretrained
    WanTransformer3DModel.from_pretrained = lambda *args, **kwargs: opened.append(args) or before(*args, **kwargs)
    try:
        enable_context_parallel(pipeline, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    finally:
        WanTransformer3DModel.from_pretrained = before
    shares = [local_share(model) for model in (transformer, text_encoder)]
    wrong = error(latents(pipeline), expected)
    disable_context_parallel(pipeline)
    same = all(
        torch.equal(a, b)
        for a, b in zip(transformer.state_dict().values(), unsharded.transformer.state_dict().values())
    )
    with torch.device("meta"):
        config = WanTransformer3DModel.load_config(folder, subfolder="transformer")
        alone = WanTransformer3DModel.from_config(config).to(torch.bfloat16)
    alone.register_to_config(_name_or_path=str(folder / "transformer"))
    enable_context_parallel(alone, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    disable_context_parallel(alone)
    loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32, torch.bfloat16}  # some stay as they are
    pairs = [*zip(alone.parameters(), loaded.parameters()), *zip(alone.buffers(), loaded.buffers())]
    same = same and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    missing = copy.deepcopy(pipeline)
    missing.transformer.to("meta")
    missing.register_to_config(_name_or_path=str(folder / "nothing"))
    missing.transformer.register_to_config(_name_or_path=str(folder / "nothing"))
    try:
        enable_context_parallel(missing, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    except AttentionProviderError as refused:
        message = str(refused)
    return wrong, shares, same, len(opened) == (rank == 0), message


def test_models_on_the_meta_device_come_from_their_files(pool, tmp_path):
    tiny_pipelines.make("wan").save_pretrained(tmp_path)
    for wrong, shares, same, first_reads, message in pool.run(2, from_files, folder=tmp_path):
        assert wrong < 1e-5 and same and first_reads
        assert shares == pytest.approx([0.5, 0.5], rel=0.03)
        assert "transformer (WanTransformer3DModel) is on the meta device, and its weights were not found in" in message


def refusals(meshes):
    """The messages of what is refused, before and while weights are sharded."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    mesh, rank = meshes.lines[2], torch.distributed.get_rank()
    pipeline = tiny_pipelines.make("wan")
    model = pipeline.transformer
    messages = {}

    def attempt(name, call):
        try:
            call()
        except AttentionProviderError as refused:
            messages[name] = str(refused)

    def enable(target, **options):
        settings = {"shard_weights": True, "mesh": mesh, "verbose": False, **options}
        return lambda: enable_context_parallel(target, **settings)

    attempt("name", enable(pipeline, shard_weights=("vae",)))
    attempt("kind", enable(pipeline, shard_weights="transformer"))
    attempt("none", enable(pipeline, shard_weights=()))
    attempt("names of a model", enable(model, shard_weights=("transformer",)))
    attempt("graphs", enable(pipeline, cuda_graphs=True))
    attempt("other names", enable(pipeline, shard_weights=("transformer", "text_encoder")[: 1 + rank]))
    attempt("inputs", enable(pipeline, inputs="sync"))
    add_hook_to_module(model.blocks[0], ModelHook())
    attempt("offloaded", enable(pipeline))
    pipeline = tiny_pipelines.make("wan")
    model = pipeline.transformer
    model.compile(backend="eager")
    attempt("compiled whole", enable(pipeline))
    pipeline = tiny_pipelines.make("wan")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    attempt("compiled whole, wrapped", enable(pipeline))
    pipeline = tiny_pipelines.make("wan")
    model = pipeline.transformer
    enable(pipeline)()
    attempt("to", lambda: pipeline.to(torch.float64))
    attempt("group offload", lambda: model.enable_group_offload(torch.device("meta")))
    attempt("offload", lambda: pipeline.enable_model_cpu_offload(device="cpu"))
    attempt("tokens", lambda: pipeline.text_encoder.resize_token_embeddings(200))
    attempt("save", lambda: model.save_pretrained("/nowhere"))
    attempt("copy", lambda: copy.deepcopy(model))
    attempt("compiled whole later", lambda: apply_compile(model, "full", backend="eager"))
    attempt("compiled whole later, wrapped", lambda: torch.compile(model, backend="eager")(**inputs("wan")))
    attempt("fuse", lambda: model.fuse_lora())
    attempt("graphs later", lambda: apply_cuda_graphs(model))
    pipeline.to("cpu")
    wrong = inputs("wan")
    try:
        model(**{**wrong, "timestep": None})
    except Exception:
        pass
    first = latents(pipeline)  # a forward that failed leaves nothing behind
    attempt("twice", enable(pipeline))
    assert cuda_graphs_status(model) is None
    disable_context_parallel(pipeline)
    last = latents(pipeline)
    if rank == 1:
        pipeline.vae.to = lambda *_: pipeline.vae.no_memory
    attempt("one rank", enable(pipeline))
    pipeline.vae.__dict__.pop("to", None)
    attempt("sharded in part", enable(pipeline))
    return messages, error(first, last)


MESSAGES = {
    "name": "'vae' cannot be sharded. Accepted are True, False, and names among 'text_encoder', 'transformer'",
    "kind": "accepted are True, False, and names of the pipeline's components",
    "none": "shard_weights=(): there is nothing to shard",
    "names of a model": "names components of a pipeline, but a WanTransformer3DModel was given",
    "graphs": "cuda_graphs=True does not combine with shard_weights",
    "other names": "called enable_context_parallel with different choices. sharded weights: ",
    "inputs": "inputs='sync'",
    "offloaded": "Accelerate's ModelHook on 'blocks.0' moves or casts them",
    "compiled whole": 'apply_compile(model, "regional")',
    "compiled whole, wrapped": 'apply_compile(model, "regional")',
    "to": "cannot become float64 on cpu",
    "group offload": "enable_group_offload of this WanTransformer3DModel is not possible",
    "offload": "offloading of this UMT5EncoderModel is not possible",
    "tokens": "Add them, and textual inversions, before enable_context_parallel",
    "save": "each rank would save its shard. Call disable_context_parallel on all ranks first",
    "copy": "copy or pickle of this WanTransformer3DModel is not possible",
    "compiled whole later": "compile of this WanTransformer3DModel is not possible",
    "compiled whole later, wrapped": "compile of this WanTransformer3DModel is not possible",
    "fuse": "adapters cannot be merged into shards",
    "graphs later": "the weights of this WanTransformer3DModel are sharded",
    "one rank": "rank 1 could not shard its weights: AttributeError: 'AutoencoderKLWan' object has no attribute",
    "sharded in part": "is a DTensor, and only plain tensors are sharded. Load the model again",
    "twice": "is split between ranks already",
}


def test_refusals_name_what_to_do(pool):
    for messages, wrong in pool.run(2, refusals):
        assert wrong < 1e-5
        for name, words in MESSAGES.items():
            assert words in messages.get(name, ""), (name, json.dumps(messages.get(name)))


def sharded_zoo(meshes):
    """Every model of the zoo, sharded and not split: what differs from the plain model, and what is left of it."""
    from tests.zoo import CASES, outputs

    answers = {}
    for name, case in CASES.items():
        model = case.build().eval()
        with torch.no_grad():
            expected = outputs(model(**case.inputs()))
            before = state(model)
            shard_alone(model, meshes)
            share = local_share(model)
            try:
                found = outputs(model(**case.inputs()))
            except AttentionProviderError as refused:
                answers[name] = (str(refused), share, True)
                gather([model])
                continue
            gather([model])
        wrong = max(error(one, other) for one, other in zip(found, expected))
        answers[name] = (wrong, share, state(model) == before)
    return answers


@pytest.mark.thorough
def test_every_model_of_the_zoo(pool):
    for answers in pool.run(2, sharded_zoo):
        assert len(answers) > 100
        for name, (wrong, share, restored) in answers.items():
            assert restored and share == pytest.approx(0.5, rel=0.1), name
            if name == "dit":  # its forward calls a layer within the first block
                assert "Leave this model out of shard_weights" in wrong
            else:
                assert wrong < 1e-5, name


def families(meshes):
    """Pipelines with guidance in float64: what differs from one process, with shards and after them."""
    from tests.guidance.families import FAMILIES, build, draw

    answers = {}
    for name in FAMILIES:
        pipeline = build(name)
        expected = draw(pipeline, name)
        enable_context_parallel(pipeline, shard_weights=True, verbose=False)
        wrong = error(draw(pipeline, name), expected)
        disable_context_parallel(pipeline)
        answers[name] = wrong, torch.equal(draw(pipeline, name), expected)
    return answers


@pytest.mark.thorough
def test_families_of_pipelines(pool):
    for answers in pool.run(4, families):
        for name, (wrong, restored) in answers.items():
            assert wrong < (1e-6 if name == "sana" else 1e-10) and restored, name  # Sana computes some in float32


def freed(meshes):
    """Whether a model that was sharded is freed without being disabled."""
    model = build("wan")
    enable_context_parallel(model, shard_weights=True, mesh=meshes.lines[2], verbose=False)
    with torch.no_grad():
        model(**inputs("wan"))
    reference = weakref.ref(model)
    del model
    gc.collect()
    return reference() is None


def test_a_sharded_model_is_freed(pool):
    assert all(pool.run(2, freed))


def test_units_are_blocks_and_layers():
    from diffusers_attn.parallelize.weights.units import units

    flux = {unit.path: unit.next for unit in units(build("flux"))}
    assert flux["transformer_blocks.0"] == "transformer_blocks.1" and flux["transformer_blocks.1"] is None
    assert "context_embedder" in flux and "transformer_blocks.0.attn" not in flux
    encoder = tiny_pipelines.make("wan").text_encoder
    shared = next(unit for unit in units(encoder) if len(unit.modules) == 2)
    assert shared.modules[0].weight is shared.modules[1].weight  # T5's two embeddings
