"""Paths that people have in their programs lead to where things are."""

import subprocess
import sys

import pytest


def test_presses():
    import vesicle.presses
    from vesicle.integrations import kvpress

    assert vesicle.presses.__all__ == kvpress.__all__
    for name in kvpress.__all__:
        assert getattr(vesicle.presses, name) is getattr(kvpress, name)


def test_lm_eval():
    pytest.importorskip("lm_eval")
    from vesicle.evaluation import lm_eval
    from vesicle.integrations.lm_eval.model import VesicleLM

    assert lm_eval.VesicleLM is VesicleLM


def test_without_the_harness_one_line_says_so():
    code = """
import runpy, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

sys.meta_path.insert(0, Without())
runpy.run_module("vesicle.evaluation.lm_eval", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "vesicle: error: lm_eval is not installed: pip install 'vesicle[lm-eval]'\n"
    )
