"""The kernels for GPUs in Triton's interpreter, on the CPU; test_cuda.py runs them on a device."""

import os
import subprocess
import sys

import pytest

CODE = """
import torch
from test_nn import D, IDS, N, SPECS, random_table
from cqr_compress import CompressedEmbedding
from cqr_compress.kernel import gpu
from cqr_compress.table.decode import decode_rows, gather_rows, with_exact_rows
from cqr_compress.table.spec import TrellisSpec
from cqr_compress.table.trellis import value_table, window_states

for name, spec in SPECS.items():
    layer = CompressedEmbedding(random_table(spec)).requires_grad_(False)
    tensors, spec = layer._lookup_tensors(), layer.spec
    for ids in (torch.randint(N, (19,)), torch.arange(0, N, 7, dtype=torch.int32), torch.tensor([], dtype=torch.int64)):
        if not gpu.supports(spec, tensors, ids):
            print("not supported:", name)
            break
        is_trellis = isinstance(spec, TrellisSpec)
        found = gpu.lookup(spec, tensors, ids, value_table(spec, tensors) if is_trellis else None)
        left_out = {"rotation"} | ({"row_mean"} if is_trellis and spec.rotation else set())
        here = gather_rows(spec, {s: t for s, t in tensors.items() if s not in left_out}, ids)
        torch.testing.assert_close(found, decode_rows(spec, here, ids), rtol=1e-5, atol=1e-4)
        if is_trellis:
            states = window_states(here["codes"], tensors["dim_rates"], spec.window, here.get("tiers"))
            assert torch.equal(gpu.trellis_states(spec, tensors, ids), states), name
        if "kept_ids" in tensors:
            for dtype in (torch.float32, torch.float16):
                rows = torch.randn(len(ids), D).to(dtype)
                wanted = with_exact_rows(spec, tensors, ids, rows.clone())
                gpu.write_exact_rows(spec, tensors, ids, rows)
                assert torch.equal(rows, wanted), name
    for short, tensor in tensors.items():
        if short in spec.body_shapes() and tensor.numel():
            assert not gpu.supports(spec, {**tensors, short: tensor.flatten()[:-1]}, IDS.flatten()), (name, short)
"""


def test_kernels_agree_with_torch() -> None:
    pytest.importorskip("triton", reason="torch for the CPU comes without Triton")
    here = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, env=here)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split("\n") == ["not supported: qr", ""]
