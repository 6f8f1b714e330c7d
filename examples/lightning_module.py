"""A LightningModule: `training_step` is the loss."""

import lightning
import torch
from toy import make_model, make_rows, make_tokenizer

import fastrm
from fastrm.data import RaggedCollator, tokenize_rows


class Reward(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.model, model.score

    def training_step(self, batch, batch_idx):
        hidden = self.backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        loss = fastrm.listwise_loss(
            hidden, self.head.weight, self.head.bias,
            offsets=batch["offsets"], target=batch["target"], rows=batch["rows"],
        )
        self.log("loss", loss, batch_size=len(batch["target"]))
        if batch_idx % 6 == 0:
            self.print(f"epoch {self.current_epoch}  batch {batch_idx:2d}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


tokenizer = make_tokenizer()
loader = torch.utils.data.DataLoader(
    tokenize_rows(tokenizer, make_rows(96), max_length=128, pairs=False),
    batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0),
    collate_fn=RaggedCollator(tokenizer.pad_token_id, last_token=True),
)
trainer = lightning.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Reward(make_model()), loader)
