"""Lightning and the Trainer of transformers run the clusterings of a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cqr_compress as cqr

IDS = torch.arange(640) % 200
LABELS = (IDS / 200).float()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = cqr.CQREmbedding(200, 16, codebook_size=8)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.items(input_ids).sum(-1)
        return {"loss": (rows - labels).square().mean(), "logits": rows}


def pointers(model: Model) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.items.buffers()]


def test_lightning_clusters_and_resumes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from cqr_compress.integrations.lightning_callback import ClusterCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS, LABELS), 64)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}

    def fit(module: Any, callback: ClusterCallback, **more: Any) -> Any:
        resume = more.pop("ckpt_path", None)
        trainer = lightning.Trainer(default_root_dir=tmp_path, callbacks=[callback], **quiet, **more)
        trainer.fit(module, data, ckpt_path=resume)
        return trainer

    module, callback = Module(), ClusterCallback()
    before = pointers(module.model)
    trainer = fit(module, callback, max_epochs=4)
    assert callback.schedule is not None and callback.schedule.steps == (10, 20, 30)
    assert callback.schedule.steps_done == 40
    assert any(not torch.equal(a, b) for a, b in zip(before, pointers(module.model), strict=True))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ClusterCallback()
    fit(Module(), again, max_epochs=5, ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.schedule is not None and again.schedule.steps_done == 50
    one = ClusterCallback()
    fit(Module(), one, max_epochs=1, accumulate_grad_batches=2)
    assert one.schedule is not None and one.schedule.steps_done == 5 and len(one.schedule.steps) == 2


def test_the_trainer_of_transformers_clusters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from cqr_compress.integrations.trainer_callback import ClusterCallback

    data = [{"input_ids": i, "labels": y} for i, y in zip(IDS, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=64, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model, callback = Model(), ClusterCallback()
    before = pointers(model)
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.schedule is not None and callback.schedule.steps == (10, 20, 30)
    assert callback.schedule.steps_done == 40
    assert any(not torch.equal(a, b) for a, b in zip(before, pointers(model), strict=True))
