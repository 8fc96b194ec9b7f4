"""Which providers are usable, and the reasons for others. Packages are real folders on the path, some broken."""

import sys
import textwrap

import pytest
import torch

from diffusers_attn import AttentionProvider, AttentionProviderError, list_providers, provider_status
from diffusers_attn.providers import registry
from diffusers_attn.providers.catalog import SPECS

from .. import launching

SPECIFIED = {
    "flash", "flash_varlen", "flash_3", "flash_3_fp8", "flash_4", "flex", "native", "_native_cudnn",
    "_native_efficient", "_native_flash", "_native_math", "sage", "sage_varlen", "sage_3", "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton", "xformers",
}  # fmt: skip


def test_all_specified_providers_exist_by_their_names():
    assert set(SPECS) == SPECIFIED
    assert {member.value for member in AttentionProvider} == SPECIFIED | {"auto"}
    assert AttentionProvider.FLASH == "flash" and str(AttentionProvider.FLASH) == "flash"


def test_the_list_has_usable_ones_first():
    statuses = list_providers()
    assert [status.available for status in statuses] == sorted((s.available for s in statuses), reverse=True)
    assert {"native", "_native_math", "flex"} <= {status.name for status in statuses if status.available}
    assert {status.name for status in statuses} == SPECIFIED


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_what_needs_a_gpu_says_so():
    assert "CUDA device" in provider_status("_native_cudnn").reason
    assert str(provider_status("_native_cudnn")).startswith("_native_cudnn")


def test_an_unknown_name():
    for name, meant in (
        ("nativ", "'native'"),
        ("Flash_3", "'flash_3'"),
        ("sage-varlen", "'sage_varlen'"),
        ("cudnn", "'_native_cudnn'"),
    ):
        with pytest.raises(
            AttentionProviderError, match=f"no attention provider '{name}'. Did you mean {meant}"
        ) as error:
            provider_status(name)
        assert str(error.value).count("'") <= 8  # a few, and not the list
    with pytest.raises(AttentionProviderError, match="There are: auto, native, .*xformers"):
        provider_status("cosine")
    with pytest.raises(AttentionProviderError, match="There are: auto, native"):
        provider_status(3)


def install(folder, distribution, version, module, body):
    """A package as pip leaves it: the module and its metadata."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    package = folder / module
    package.mkdir()
    (package / "__init__.py").write_text(body)


def run(folder, code):
    code = textwrap.dedent(code)
    result = launching.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{folder}:."})
    assert result.returncode == 0, result.stderr
    return result.stdout


SAY = """
import diffusers_attn
print(diffusers_attn.provider_status("flash"))
try:
    diffusers_attn.attention_provider("flash")
except diffusers_attn.ProviderUnavailableError as error:
    print(error)
"""


def test_a_missing_package(tmp_path):
    output = run(tmp_path, SAY)
    if torch.cuda.is_available() and provider_status("flash").available:
        pytest.skip("flash-attn is installed here, so it cannot be missing")
    assert "flash-attn>=2.6.3 is not installed" in output
    assert "Install it with `pip install flash-attn --no-build-isolation`. Providers available here: native" in output


def test_a_package_that_is_too_old(tmp_path):
    install(tmp_path, "flash-attn", "2.5.9", "flash_attn", "raise ImportError('never to be imported')")
    output = run(tmp_path, SAY)
    assert "flash-attn 2.5.9 is older than 2.6.3" in output and "pip install flash-attn" in output


def test_an_xformers_without_kernels_is_not_usable(tmp_path):
    """As a wheel for another CUDA: it imports with a warning, and each of its operators refuses every call."""
    install(tmp_path, "xformers", "0.0.35", "xformers", "")
    (tmp_path / "xformers" / "_cpp_lib.py").write_text("_built_with_cuda = False")
    (tmp_path / "xformers" / "ops").mkdir()
    (tmp_path / "xformers" / "ops" / "__init__.py").write_text("fmha = None")
    output = run(
        tmp_path,
        """
        import diffusers_attn
        from diffusers_attn.providers import registry
        registry.device_reason = lambda spec: ""
        print(diffusers_attn.provider_status("xformers"))
        """,
    )
    assert "its CUDA kernels do not load" in output and "python -m xformers.info" in output


def test_a_broken_package_breaks_its_provider_only(tmp_path):
    """As a wheel for another CUDA or PyTorch does: it is installed, and importing it raises."""
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn", "raise OSError('undefined symbol: _ZN3c104')")
    output = run(
        tmp_path,
        """
        import diffusers_attn
        from diffusers_attn.providers import registry
        # The devices are looked at before the package; this is about the package.
        registry.device_reason = lambda spec: ""
        """
        + textwrap.indent(SAY, " " * 8),
    )
    assert "cannot be imported: OSError: undefined symbol" in output
    assert "pip install flash-attn" in output and "Providers available here: native" in output


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"Metadata-Version: 2.1\nName: xformers\n"])
def test_a_package_with_damaged_metadata_is_not_available(tmp_path, monkeypatch, content):
    (tmp_path / "xformers-0.0.35.dist-info").mkdir()
    (tmp_path / "xformers-0.0.35.dist-info" / "METADATA").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    registry._package_status.cache_clear()
    status = registry.provider_status("xformers", "package")
    registry._package_status.cache_clear()
    assert not status.available and ("cannot be read" in status.reason) == content.startswith(b"\xff")
