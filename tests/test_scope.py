"""Which provider is active: the innermost scope of this thread, else the caller's, else native."""

import threading

import pytest

from diffusers_attn import AttentionProvider, AttentionProviderError, ProviderUnavailableError, attention_provider
from diffusers_attn.scope import ProviderChoice, active_choice

BOUND = ProviderChoice.of("_native_math")


def active(bound=None):
    return active_choice(bound).provider


def test_scopes_nest_and_end():
    assert active() == "native"
    with attention_provider("flex"):
        assert active() == "flex"
        with attention_provider(AttentionProvider.AUTO):
            assert active() == "auto"
        assert active() == "flex"
    assert active() == "native"


def test_a_scope_overrides_what_a_caller_is_bound_to():
    assert active(BOUND) == "_native_math"
    with attention_provider("native"):
        assert active(BOUND) == "native"


def test_an_exception_ends_the_scope():
    with pytest.raises(KeyError), attention_provider("flex"):
        raise KeyError
    assert active() == "native"


def test_one_scope_object_can_be_entered_again_and_decorate():
    scope = attention_provider("flex")
    with scope, attention_provider("native"), scope:
        assert active() == "flex"
    assert active() == "native"
    assert scope(active)() == "flex"


def test_threads_do_not_see_each_other():
    names = ["native", "_native_math", "flex", "auto"]
    barrier = threading.Barrier(len(names))
    seen: dict[str, list[str]] = {}

    def work(name):
        seen[name] = []
        with attention_provider(name):
            for _ in range(20):
                barrier.wait()
                seen[name].append(active())
        barrier.wait()
        seen[name].append(active())

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    with attention_provider("flex"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {name: [name] * 20 + ["native"] for name in names}


def test_a_provider_that_is_not_here_is_refused_before_the_scope_begins():
    with pytest.raises(ProviderUnavailableError, match="pip install") as error:
        attention_provider("sage_varlen")
    assert "Providers available here: native" in str(error.value)
    assert active() == "native"


def test_a_name_that_does_not_exist():
    with pytest.raises(AttentionProviderError, match="no attention provider 'falsh'. Did you mean 'flash'"):
        attention_provider("falsh")


@pytest.mark.parametrize(
    ("provider", "options", "message"),
    [
        ("native", {"deterministic": True}, "'native' has no option 'deterministic'; its options: none"),
        ("flash", {"determinstic": True}, "no option 'determinstic'; its options: deterministic"),
        ("flash", {"deterministic": 1}, "deterministic=1 .*bool"),
        ("flash", {"softcap": True}, "softcap=True .*float or int"),
        ("_sage_qk_int8_pv_fp16_cuda", {"qk_quant_gran": "per_tensor"}, "per_warp.*per_thread"),
        ("auto", {"lossy": "sages"}, "no attention provider 'sages'"),
    ],
)
def test_options_are_checked(provider, options, message):
    with pytest.raises(AttentionProviderError, match=message):
        ProviderChoice.of(provider, **options)


def test_equal_choices_are_one_object_and_survive_copying():
    import copy
    import pickle

    choice = ProviderChoice.of("flash", deterministic=True, softcap=1.5)
    assert ProviderChoice.of(AttentionProvider.FLASH, softcap=1.5, deterministic=True) is choice
    assert choice.updated(softcap=2.0).options == (("deterministic", True), ("softcap", 2.0))
    assert pickle.loads(pickle.dumps(choice)) is choice
    assert copy.deepcopy(choice) is choice
