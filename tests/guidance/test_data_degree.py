"""`data_degree`: groups of ranks compute different samples of a batch, and give the latents of one process."""

from __future__ import annotations

import pytest
from torch.distributed.device_mesh import init_device_mesh

from diffusers_attn import AttentionProviderError, disable_context_parallel, enable_context_parallel
from diffusers_attn.guidance.division import Divider
from diffusers_attn.guidance.installed import guided_call
from tests.zoo import CASES

from .families import build
from .test_pipelines import RANKS, computed

STEPS = 2
CALLS = {
    # (family, degrees, arguments of the call): calls of the transformer that a rank computes once steps are known.
    "uneven images, guidance by call": (
        "wan", {"data_degree": 2, "guidance_degree": 2}, {"num_videos_per_prompt": 3}, STEPS,
    ),
    "uneven images without guidance": ("wan", {"data_degree": 2}, {"num_videos_per_prompt": 3, "scale": 1.0}, STEPS),
    "a ring in each group": (
        "wan", {"data_degree": 2, "guidance_degree": 1, "ring_degree": 2}, {"prompts": 2}, 2 * STEPS,
    ),
    "fewer images than groups": ("wan", {"data_degree": 4}, {"num_videos_per_prompt": 2}, STEPS),
    "both branches in one batch": ("z_image", {"data_degree": 2, "guidance_degree": 2}, {"prompts": 2}, STEPS),
}  # fmt: skip


def divided(meshes):
    found = {}
    for case, (name, degrees, arguments, _) in CALLS.items():
        pipe = build(name)
        report = enable_context_parallel(pipe, verbose=False, **degrees)
        answers = [computed(pipe, name, steps=STEPS, **arguments) for _ in range(2)]
        disable_context_parallel(pipe)
        found[case] = report.guidance, answers
    return found


def test_batches_are_divided(pool):
    for found in pool.run(RANKS, divided):
        assert {case: [error for error, _ in answers if not error < 1e-10] for case, (_, answers) in found.items()} == {
            case: [] for case in CALLS
        }
        assert {case: answers[-1][1] for case, (_, answers) in found.items()} == {
            case: calls for case, (*_, calls) in CALLS.items()
        }
        reports = [guidance for guidance, _ in found.values()]
        assert reports[0].startswith("samples of a batch by 2 groups of ranks and branches of guidance by 2 groups of")
        assert reports[2] == "samples of a batch by 2 groups of ranks, each with a ring of 2"


def refused(meshes):
    pipe, messages = build("wan"), []
    for options in (
        {"data_degree": 3},
        {"data_degree": 4, "guidance_degree": 2},
        {"data_degree": 2, "mesh": meshes.lines[4]},
        {"data_degree": 2, "ring_degree": 4},
    ):
        with pytest.raises(AttentionProviderError) as caught:
            enable_context_parallel(pipe, verbose=False, **options)
        messages.append(str(caught.value))
    with pytest.raises(AttentionProviderError) as caught:
        enable_context_parallel(CASES["lumina_next"].build(), verbose=False, data_degree=2)
    return [*messages, str(caught.value)], guided_call(pipe.transformer)


def test_degrees_that_do_not_fit_are_refused(pool):
    for (number, product, mesh, ring, model), call in pool.run(RANKS, refused):
        assert "data_degree=3: the number of groups of ranks must divide the 4 ranks; accepted are 1, 2, 4" in number
        assert "guidance_degree=2 and data_degree=4 make 8 groups" in product
        assert "data_degree=2 divides all ranks of the job, and mesh=... names some" in mesh
        assert "ring_degree=4 for 2 ranks" in ring
        assert "its samples influence each other" in model
        assert call is None


@pytest.mark.parametrize(
    ("degrees", "samples", "branches", "expected"),
    [
        ((None, None), 2, 2, (2, 2)),  # two images, two branches: four groups
        ((None, None), 3, 2, (1, 2)),  # divided evenly, or not
        ((2, None), 1, 2, (1, 2)),
        ((2, None), 2, 2, (2, 1)),
        ((1, 2), 3, 2, (2, 1)),  # a named `data_degree` also divides unevenly
        ((2, 2), 3, 2, (2, 2)),
        ((2, 2), 1, 2, (1, 2)),
        ((2, 2), 4, 1, (4, 1)),  # two images, both branches in one batch
        ((2, 2), 6, 1, (2, 1)),
        ((None, 2), 4, 1, (4, 1)),
        ((None, 1), 4, 1, (2, 1)),  # branches alone
        ((1, 4), 2, 1, (1, 1)),
    ],
)
def test_the_division_of_a_step(degrees, samples, branches, expected):
    assert Divider(4, *degrees).division(samples, branches, guides=True) == expected


def by_meshes(meshes):
    """Reports and errors with meshes that have dimensions for groups, and messages for those that are refused."""
    found, messages = [], []
    pipe = build("wan")
    for names in (("guidance", "ulysses"), ("data", "guidance")):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        report = enable_context_parallel(pipe, verbose=False, mesh=mesh)
        found.append((report.guidance, computed(pipe, "wan", steps=STEPS, num_videos_per_prompt=2)[0]))
        disable_context_parallel(pipe)
    wrong = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "guidance"))
    for options in ({"mesh": wrong}, {"mesh": meshes.pairs}, {"mesh": mesh, "data_degree": 4}):
        with pytest.raises(AttentionProviderError) as caught:
            enable_context_parallel(pipe, verbose=False, **options)
        messages.append(str(caught.value))
    return found, messages


def test_a_mesh_with_dimensions_for_groups(pool):
    for found, (order, other, degree) in pool.run(RANKS, by_meshes):
        assert all(error < 1e-10 for _, error in found)
        assert found[0][0].endswith("by 2 groups of ranks, each with Ulysses over 2")
        assert found[1][0] == "samples of a batch by 2 groups of ranks and branches of guidance by 2 groups of each"
        assert "'data', 'guidance', 'ring', 'ulysses', in this order" in order and "('data', 'cp')" in other
        assert "data_degree=4, but the mesh has 2" in degree
