"""SAEs inside a module that `torch.compile` works on: selection stays outside of the graphs, and the results stay."""

from unhooked import run_cases


def test_compiled_an_sae_gives_what_it_gives():
    # the compiler does not follow functions that the hook has wrapped
    run_cases("compile_cases.py")
