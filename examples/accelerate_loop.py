"""A loop with Accelerate: `accelerate launch accelerate_loop.py` runs it on several devices.

Backbone, head and loss are one module, so that the wrapper of data parallelism sees every forward.
"""

import torch
from accelerate import Accelerator
from toy import make_model, make_rows, make_tokenizer

import fastrm
from fastrm.data import RaggedCollator, tokenize_rows


class RewardModel(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.model, model.score

    def forward(self, input_ids, attention_mask, groups, num_items_in_batch=None):
        hidden = self.backbone(input_ids, attention_mask).last_hidden_state
        return fastrm.listwise_loss(
            hidden, self.head.weight, self.head.bias, **groups,
            num_items_in_batch=num_items_in_batch,
        )


accelerator = Accelerator()
tokenizer = make_tokenizer()
examples = tokenize_rows(tokenizer, make_rows(96), max_length=128, pairs=False)
loader = torch.utils.data.DataLoader(
    examples, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0),
    collate_fn=RaggedCollator(tokenizer.pad_token_id, last_token=True),
)
model = RewardModel(make_model())
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0
for _ in range(3):
    for batch in loader:
        groups = {name: batch.pop(name) for name in ("offsets", "target", "rows")}
        # The mean over the groups of all devices: their number differs in the last batch.
        total = accelerator.reduce(torch.tensor(len(groups["target"]), device=accelerator.device))
        loss = model(batch["input_ids"], batch["attention_mask"], groups, total)
        accelerator.backward(loss * accelerator.num_processes)  # devices are averaged
        optimizer.step()
        optimizer.zero_grad()
        if step % 6 == 0:
            accelerator.print(f"step {step:3d}  loss {accelerator.reduce(loss.detach()):.4f}")
        step += 1
accelerator.print(f"step {step:3d}  loss {accelerator.reduce(loss.detach()):.4f}")
accelerator.end_training()
