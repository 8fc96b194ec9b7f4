"""Write the tables, charts and drawings of docs/ from what they describe: the catalog, the recorded runs,
diffusers' models.

python docs/generate.py            # write
python docs/generate.py --check    # fail where a table is not what would be written
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import charts
import strategy_drawings

from diffusers_attn.masks import MaskKind
from diffusers_attn.providers.base import Capabilities, ProviderSpec
from diffusers_attn.providers.catalog import DIFFUSERS_BACKENDS, SPECS
from diffusers_attn.providers.hub import KERNELS
from diffusers_attn.providers.registry import as_arguments

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def masks(can: Capabilities) -> str:
    kinds = can.masks - {MaskKind.NONE}
    if not kinds:
        return "none"
    if kinds == {MaskKind.KEY}:
        return "key"
    if MaskKind.BLOCK in kinds:
        return "all, and BlockMask"
    return "all" if MaskKind.BIAS in kinds else "bool"


def runs_on(can: Capabilities) -> str:
    if "cpu" in can.devices:
        return "CPU, GPU"
    if can.compute_capabilities:
        return "GPU, only " + ", ".join("sm_{}{}".format(*each) for each in sorted(can.compute_capabilities))
    assert can.min_compute_capability is not None
    return "GPU, sm_{}{} or newer".format(*can.min_compute_capability)


def training(can: Capabilities) -> str:
    if not can.backward:
        return "no"
    return "yes, on a GPU" if can.without_backward_on else "yes"


def parallel(can: Capabilities) -> str:
    """Strategies of context parallelism: a ring merges partial results, for which it needs their lse."""
    return "Ulysses, ring" if can.lse else "Ulysses"


def install(spec: ProviderSpec) -> str:
    if spec.requirement is None:
        return "with PyTorch"
    package = code(spec.requirement.install.split("   #")[0])
    return f'{code(KERNELS.install)} and `source="hub"`, or {package}' if spec.hub else package


def provider_table() -> str:
    header = ("provider", "install (Linux and WSL)", "runs on", "masks", "training", "context parallelism", "")
    rows = [
        (
            code(spec.name),
            install(spec),
            runs_on(spec.capabilities),
            masks(spec.capabilities),
            training(spec.capabilities),
            parallel(spec.capabilities),
            "" if spec.capabilities.exact else "lossy",
        )
        for spec in SPECS.values()
    ]
    return table(header, rows)


def capability_table() -> str:
    header = ("provider", "dtypes", "head_dim", "GQA", "causal", "dropout", "lse", "CUDA graph", "options")
    rows = []
    for spec in SPECS.values():
        can = spec.capabilities
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in can.dtypes))
        causal = {"top_left": "any lengths", "square": "any lengths (split)", "none": "no"}[can.causal]
        rows.append(
            (
                code(spec.name),
                dtypes,
                f"to {can.max_head_dim}" if can.max_head_dim else "any",
                "kernel" if can.gqa else "repeated",
                causal,
                "yes" if can.dropout else "no",
                "yes" if can.lse else "no",
                "yes" if can.cuda_graph else "refused",
                ", ".join(code(name) for name in spec.options) or "none",
            )
        )
    return table(header, rows)


def hub_table() -> str:
    """The kernels on the Hub, and the backends of diffusers that take them."""
    header = ("backend of diffusers", "provider", "kernel on the Hub")
    rows = []
    for backend, name in DIFFUSERS_BACKENDS.items():
        kernel = SPECS[name].hub
        arguments = as_arguments(backend).replace("'", '"')
        from_hub = f"{code(kernel.repo)}, version {kernel.version}" if kernel and "source" in arguments else ""
        rows.append((code(backend), code(arguments), from_hub))
    named = set(DIFFUSERS_BACKENDS.values())
    for name, spec in SPECS.items():
        if spec.hub and name not in named:
            rows.append(("", code(f'"{name}", source="hub"'), f"{code(spec.hub.repo)}, version {spec.hub.version}"))
    return table(header, rows)


def overhead_table() -> str:
    header = ("µs a call, on", "call", "direct", "ours adds", "diffusers adds", "diffusers with its checks on")
    rows = []
    for path in sorted(RESULTS.glob("dispatch_overhead-*.json")):
        record = json.loads(path.read_text())
        for name, result in record["microseconds"].items():
            cells = (result.get(key) for key in ("direct", "ours", "theirs", "theirs_checked"))
            rows.append((record["device"], name, *("" if cell is None else f"{cell:.2f}" for cell in cells)))
    return table(header, rows)


def speed_tables() -> str:
    """One section for each recorded run of benchmarks/providers.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import providers

    return "\n\n".join(
        providers.markdown(json.loads(path.read_text())) for path in sorted(RESULTS.glob("providers-*.json"))
    )


def strategy_tables() -> str:
    """One section for each recorded run of benchmarks/context_parallel.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import context_parallel

    runs = sorted(RESULTS.glob("context_parallel-*.json"))
    return "\n".join(context_parallel.markdown(json.loads(path.read_text())) for path in runs).rstrip()


def _rivals() -> list[tuple[str, dict[str, Any]]]:
    """Name and results of each recorded run of benchmarks/rivals.py."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("rivals-*.json"))]


def rival_tables() -> str:
    """One section for each recorded run of benchmarks/rivals.py, with its drawing."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import rivals

    sections = [f"![Milliseconds per step](images/{name}.svg)\n\n{rivals.markdown(run)}" for name, run in _rivals()]
    return "\n".join(sections).rstrip() or "Not run yet."


def drawings() -> dict[str, str]:
    """Files that pages show, by path: charts of recorded runs, and drawings of the strategies."""
    made = {name: draw() for name, draw in {**charts.CHARTS, **strategy_drawings.DRAWINGS}.items()}
    made |= {name: charts.rivals(name, run) for name, run in _rivals()}
    return {f"docs/images/{name}.svg": drawing for name, drawing in made.items()}


def pipeline_tables() -> str:
    """One section for each recorded run of the benchmarks of pipelines and of their parts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import first_picture
    import pipelines
    import sharded_weights
    import vae

    return "\n".join(
        script.markdown(json.loads(path.read_text()))
        for script in (pipelines, first_picture, vae, sharded_weights)
        for path in sorted(RESULTS.glob(f"{script.__name__}-*.json"))
    ).rstrip()


def prediction_table() -> str:
    """Every recorded step beside its prediction."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import predictions

    header = ("run", "model", "GPUs", "strategy", "provider", "measured", "predicted", "step", "part", "")
    rows = [
        (
            row.run,
            row.model.partition(", 8 of")[0],
            str(row.ranks),
            row.strategy if row.compiled else f"{row.strategy}, eager",
            code(row.provider),
            f"{row.measured:.1f}",
            f"{row.predicted:.1f}",
            f"{row.error:+.1%}",
            f"{row.part_error:+.1%}",
            "" if abs(row.error) <= predictions.WITHIN else "miss",
        )
        for row in predictions.rows()
    ]
    return table(header, rows)


def layer_table() -> str:
    """Every layer in docs/design.md beside its prediction."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import predictions

    header = ("model", "variant", "measured", "predicted", "error")
    rows = [
        (model.partition(", 8 of")[0], variant, f"{measured:,.0f}", f"{found:,.0f}", f"{found / measured - 1:+.1%}")
        for model, variant, measured, found in predictions.layer_rows()
    ]
    return table(header, rows)


def quality_tables() -> str:
    """One section for each recorded run of benchmarks/quality.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import quality

    runs = sorted(RESULTS.glob("quality-*.json"))
    return "\n".join(quality.markdown(json.loads(path.read_text())) for path in runs).rstrip()


def training_tables() -> str:
    """One section for each recorded run of benchmarks/training.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import training

    runs = sorted(RESULTS.glob("training-*.json"), reverse=True)
    return "\n".join(training.markdown(json.loads(path.read_text())) for path in runs).rstrip()


def trainers_tables() -> str:
    """One section for each recorded run of benchmarks/trainers.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import trainers

    runs = sorted(RESULTS.glob("trainers-*.json"))
    return "\n\n".join(trainers.markdown(json.loads(path.read_text())) for path in runs)


def train_memory_tables() -> str:
    """One section for each recorded run of benchmarks/train_memory.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import train_memory

    runs = sorted(RESULTS.glob("train_memory-*.json"))
    return "\n\n".join(train_memory.markdown(json.loads(path.read_text())) for path in runs)


def script_tables() -> str:
    """One section for each recorded run of benchmarks/train_lora.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import train_lora

    runs = sorted(RESULTS.glob("train_lora-*.json"))
    tables = "\n".join(train_lora.markdown(json.loads(path.read_text())) for path in runs).rstrip()
    return tables or "Not run yet."


def models_table(package: str) -> str:
    """Of the models in diffusers.models.`package`. Runs all of the tests' tiny models: half a minute."""
    import models_page

    return table(models_page.HEADER, models_page.rows(package))


def compatibility_tables() -> str:
    """Of every feature of diffusers under every way of using this library."""
    import compatibility_page

    return compatibility_page.tables()


def trust_tables(name: str) -> str:
    """What the numeric matrix, the mutants or other people's tests found."""
    import trust_page

    return getattr(trust_page, name)()


def replace_section(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: made by docs/generate.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no section {name!r}: the markers {begin} and {end} are missing")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


GENERATIONS = {
    "T4, RTX 20": ((7, 5),),
    "A100, RTX 30": ((8, 0), (8, 6)),
    "L40S, RTX 40": ((8, 9),),
    "H100, H200": ((9, 0),),
    "B200, B300": ((10, 0), (10, 3)),
    "RTX 50": ((12, 0),),
}
"""GPUs, and their compute capabilities."""


def generation_table() -> str:
    """The providers that run on each generation of GPUs, with what decides between them."""
    header = ("provider", "CPU", *GENERATIONS, "masks", "training", "")
    rows = []
    for spec in SPECS.values():
        can = spec.capabilities
        on = ["cpu" in can.devices, *(all(runs(spec, each) for each in chips) for chips in GENERATIONS.values())]
        last = (masks(can), training(can), "" if can.exact else "lossy")
        rows.append((code(spec.name), *("✓" if here else "" for here in on), *last))
    return table(header, rows)


def runs(spec: ProviderSpec, capability: tuple[int, int]) -> bool:
    can = spec.capabilities
    if can.compute_capabilities:
        return capability in can.compute_capabilities
    return can.min_compute_capability is None or capability >= can.min_compute_capability


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/choosing_a_provider.md": {"providers": provider_table, "generations": generation_table},
    "docs/compatibility.md": {"matrix": compatibility_tables},
    "docs/performance.md": {"rivals": rival_tables},
    "docs/measured_runs.md": {
        "pipelines": pipeline_tables,
        "strategies": strategy_tables,
        "training": training_tables,
        "script": script_tables,
    },
    "docs/cost_model.md": {"predictions": prediction_table, "layers": layer_table},
    "docs/measuring.md": {"quality": quality_tables},
    "docs/training.md": {"trainers": trainers_tables, "memory": train_memory_tables},
    "docs/trust.md": {name: functools.partial(trust_tables, name) for name in ("numeric", "peers", "mutants")},
    "docs/models.md": {
        package: functools.partial(models_table, package) for package in ("transformers", "unets", "controlnets")
    },
    "docs/providers.md": {
        "capabilities": capability_table,
        "hub": hub_table,
        "speeds": speed_tables,
        "overhead": overhead_table,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name, drawing in drawings().items():
        if not (path := ROOT / name).exists() or path.read_text() != drawing:
            stale.append(name)
            if not options.check:
                path.write_text(drawing)
    for name, sections in SECTIONS.items():
        path = ROOT / name
        old = new = path.read_text()
        for section, content in sections.items():
            new = replace_section(new, section, content())
        if new != old:
            stale.append(name)
            if not options.check:
                path.write_text(new)
    if stale and options.check:
        raise SystemExit(f"stale: {', '.join(stale)}. Run: python docs/generate.py")
    print(f"{'written: ' + ', '.join(stale) if stale else 'up to date'}")


if __name__ == "__main__":
    main()
