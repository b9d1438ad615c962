"""`kernels` imports on a bare machine, and its name does not get in transformers' way."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    """Run Python from the repository root, as a user would, without what only some machines have."""
    absent = "import sys; sys.modules.update(dict.fromkeys(('triton', 'apex', 'flash_attn', 'liger_kernel')))\n"
    done = subprocess.run([sys.executable, "-c", absent + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_imports_without_triton_and_apex():
    code = "import kernels, torch; print(kernels.__file__); print(kernels.geglu(torch.ones(1, 2)).shape)"
    where, shape = run(code).splitlines()
    assert Path(where) == ROOT / "kernels" / "__init__.py" and shape == "torch.Size([1, 1])"


def test_transformers_works_beside_it():
    """Hugging Face has a package called `kernels` too, which transformers looks for."""
    code = """
import torch
from transformers import BertConfig, BertForMaskedLM
model = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
print(model(torch.zeros(1, 3, dtype=torch.long)).logits.shape)
import kernels
print(kernels.__file__)
"""
    shape, where = run(code).splitlines()
    assert shape == "torch.Size([1, 3, 9])" and Path(where).parent == ROOT / "kernels"
