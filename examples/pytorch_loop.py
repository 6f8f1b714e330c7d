"""A plain PyTorch loop: any backbone, a linear head, ragged groups, no trainer at all."""

import torch
from toy import make_model, make_rows, make_tokenizer

import fastrm
from fastrm.data import RaggedCollator, tokenize_rows

tokenizer, model = make_tokenizer(), make_model()
backbone, head = model.model, model.score  # any module that gives hidden states, any linear layer
examples = tokenize_rows(tokenizer, make_rows(96), max_length=128, pairs=False)
loader = torch.utils.data.DataLoader(
    examples, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0),
    collate_fn=RaggedCollator(tokenizer.pad_token_id, last_token=True),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(3 * len(loader)):
    if step % len(loader) == 0:
        batches = iter(loader)
    batch = next(batches)  # offsets and target say which rows of hidden are a group, and its best
    hidden = backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state  # (B, S, D)
    loss = fastrm.listwise_loss(
        hidden, head.weight, head.bias,
        offsets=batch["offsets"], target=batch["target"], rows=batch["rows"],
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 6 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")
print(f"step {step:3d}  loss {loss.item():.4f}")
